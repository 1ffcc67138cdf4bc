// A recorded program: the calls of a step, one after the other, without the host in between. Each call is an op of this
// library with arguments that were copied when it was recorded, so a replay is what the calls were, bit for bit.
#include "abi.h"

#pragma GCC visibility push(default)
extern "C" {

void tuili_replay(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].function(calls[i].args);
}
}
#pragma GCC visibility pop
