// One fixed team of threads for all ops. Work is cut into pieces, and each member has a share of them; the caller takes
// part. Who is done takes from the others' shares, so a helper that the system does not run delays only one piece.
#pragma once
#include <stdint.h>

#include <type_traits>

constexpr int CONTEXT_WORDS = 12;

using Task = void (*)(void* context, int64_t piece);

void pool_resize(int threads);
int pool_threads();
void pool_wake();  // helpers that sleep wake up and watch: work comes soon
// task(copy of the context, piece) for every piece; `bytes` at most 8 * CONTEXT_WORDS.
void pool_run(int64_t pieces, Task task, const void* context, int64_t bytes);

// f(piece) for every piece, on the team. f is copied: what it captures by value reaches the team with the call, what it
// captures by reference has to be fetched from this core.
template <class Body> inline void parallel(int64_t pieces, Body body) {
    static_assert(std::is_trivially_copyable<Body>::value && sizeof(Body) <= 8 * CONTEXT_WORDS, "capture less, or by reference");
    pool_run(pieces, [](void* context, int64_t piece) { (*static_cast<Body*>(context))(piece); }, &body, sizeof(Body));
}
