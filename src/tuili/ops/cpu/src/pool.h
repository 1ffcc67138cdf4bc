// One fixed team of threads for all ops. Work is cut into pieces that are claimed from a counter; the caller takes part.
// A helper that the system does not run delays only what it has claimed: the others take the rest.
#pragma once
#include <stdint.h>

using Task = void (*)(void* context, int64_t piece);

void pool_resize(int threads);
int pool_threads();
void pool_run(int64_t pieces, Task task, void* context);

// f(piece) for every piece, on the team.
template <class Body> inline void parallel(int64_t pieces, Body&& body) {
    pool_run(pieces, [](void* context, int64_t piece) { (*static_cast<Body*>(context))(piece); }, &body);
}
