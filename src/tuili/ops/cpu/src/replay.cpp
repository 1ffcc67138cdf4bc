// A recorded program: the calls of a step, one after the other, without the host in between. Each call is an op of this
// library with arguments that were copied when it was recorded, so a replay is what the calls were, bit for bit.
#include <string.h>

#include "abi.h"

#pragma GCC visibility push(default)
extern "C" {

const Fault* tuili_locate(const LocateArgs* a) {
    if (const Fault* found = check(*a)) return found;
    for (int64_t i = 0; i < a->requests; i++) {
        const int64_t *blocks = a->blocks + a->rows[i] * a->stride, *positions = a->positions + i * a->each;
        for (int64_t j = 0; j < a->each; j++)
            a->slots[i * a->each + j] = blocks[positions[j] / a->block_size] * a->block_size + positions[j] % a->block_size;
        int64_t last = positions[a->each - 1];
        a->context[i] = last + 1;
        memcpy(a->table + i * a->stride, blocks, (last / a->block_size + 1) * sizeof(int64_t));
    }
    return nullptr;
}

// Up to the first call that refuses a value.
const Fault* tuili_replay(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (const Fault* found = calls[i].function(calls[i].args)) return found;
    return nullptr;
}
}
#pragma GCC visibility pop
