// ik_llama.cpp through a handful of plain functions, which ikllama.py calls by ctypes: the fork has no Python bindings,
// and its structs of parameters change with every commit, so its own header is what knows them.
#include "llama.h"

extern "C" {

// `repack`: the weights are put into the order of its kernels while they are read (its flag -rtr), so not mapped.
llama_model *ik_load(const char *path, bool repack) {
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.repack_tensors = repack;
    params.use_mmap = !repack;
    return llama_model_load_from_file(path, params);
}

int ik_vocab(const llama_model *model) { return llama_n_vocab(model); }

llama_context *ik_context(llama_model *model, uint32_t positions, uint32_t sequences, uint32_t threads) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = positions;
    params.n_seq_max = sequences;
    params.n_threads = params.n_threads_batch = threads;
    return llama_init_from_model(model, params);
}

uint32_t ik_size(const llama_context *context) { return llama_n_batch(context); }

void ik_clear(llama_context *context) { llama_kv_cache_clear(context); }

void ik_cut(llama_context *context, int sequence, int start) { llama_kv_cache_seq_rm(context, sequence, start, -1); }

// `entries` are of four: token, position, sequence, whether its scores are wanted.
int ik_decode(llama_context *context, const int32_t (*entries)[4], int count) {
    llama_batch batch = llama_batch_init(count, 0, 1);
    batch.n_tokens = count;
    for (int at = 0; at < count; ++at) {
        batch.token[at] = entries[at][0];
        batch.pos[at] = entries[at][1];
        batch.n_seq_id[at] = 1;
        batch.seq_id[at][0] = entries[at][2];
        batch.logits[at] = static_cast<int8_t>(entries[at][3]);
    }
    int code = llama_decode(context, batch);
    llama_batch_free(batch);
    return code;
}

const float *ik_scores(llama_context *context, int at) { return llama_get_logits_ith(context, at); }

uint32_t ik_quantize(const char *source, const char *target, int ftype) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = static_cast<llama_ftype>(ftype);
    params.nthread = 1;
    return llama_model_quantize(source, target, &params);
}
}
