// A recorded program: the calls of a step, one after the other, without the host in between. Each call is an op of this
// library with arguments that were copied when it was recorded, so a replay is what the calls were, bit for bit.
#include <string.h>

#include "abi.h"

#pragma GCC visibility push(default)
extern "C" {

void tuili_locate(const LocateArgs* a) {
    for (int64_t i = 0; i < a->count; i++) {
        const int64_t* blocks = a->blocks + a->rows[i] * a->stride;
        int64_t column = a->positions[i] / a->block_size;
        a->slots[i] = blocks[column] * a->block_size + a->positions[i] % a->block_size;
        a->context[i] = a->positions[i] + 1;
        memcpy(a->table + i * a->stride, blocks, (column + 1) * sizeof(int64_t));
    }
}

void tuili_replay(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].function(calls[i].args);
}
}
#pragma GCC visibility pop
