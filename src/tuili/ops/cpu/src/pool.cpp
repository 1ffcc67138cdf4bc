#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include "kernels.h"

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
constexpr auto SPIN = microseconds(50);
// Where the system does not run a helper that holds a piece, the machine is busy with others: the caller then works
// alone, for this long at first and longer each time, and tries again.
constexpr auto SHORTEST_REST = microseconds(1000), LONGEST_REST = microseconds(50000);

// `open` packs a generation (high half) and the number of pieces not claimed yet (low half): a claim can only succeed
// in the generation whose task it has read, because the task changes only when nothing is left to claim.
struct Team {
    std::atomic<uint64_t> open{0};
    std::atomic<Task> task{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<int64_t> pieces{0};
    std::atomic<int64_t> finished{0};
    std::atomic<uint32_t> signal{0};  // what sleeping helpers wait for: the low half of the generation
    std::atomic<int> sleeping{0};
    std::atomic<int> wanted{0};  // helpers beyond this many leave
    std::atomic<int> alive{0};
    std::atomic<pid_t> owner{0};
    std::mutex busy;  // guards what follows, too
    Clock::time_point rested{};
    Clock::duration rest = SHORTEST_REST;
};

Team& team = *new Team;  // never destroyed: helpers may outlive main

void sleep_on(std::atomic<uint32_t>& word, uint32_t seen) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0); }

// Claims and runs pieces until none is left; returns how many.
int64_t work() {
    int64_t count = 0;
    for (;;) {
        uint64_t open = team.open.load(std::memory_order_acquire);
        for (;;) {
            uint32_t left = static_cast<uint32_t>(open);
            if (left == 0) return count;
            Task task = team.task.load(std::memory_order_relaxed);
            void* context = team.context.load(std::memory_order_relaxed);
            int64_t pieces = team.pieces.load(std::memory_order_relaxed);
            if (team.open.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel)) {
                task(context, pieces - left);
                team.finished.fetch_add(1, std::memory_order_release);
                count++;
                break;
            }
        }
    }
}

void help(int index) {
    auto since = Clock::now();
    for (;;) {
        uint32_t seen = team.signal.load(std::memory_order_seq_cst);
        if (index >= team.wanted.load(std::memory_order_relaxed)) break;
        if (work()) {
            since = Clock::now();
            continue;
        }
        if (Clock::now() - since < SPIN) {
            for (int i = 0; i < 16; i++) _mm_pause();
            continue;
        }
        team.sleeping.fetch_add(1, std::memory_order_seq_cst);
        if (static_cast<uint32_t>(team.open.load(std::memory_order_seq_cst)) == 0) sleep_on(team.signal, seen);
        team.sleeping.fetch_sub(1, std::memory_order_seq_cst);
        since = Clock::now();
    }
    team.alive.fetch_sub(1);
}

void announce() {
    team.signal.fetch_add(1, std::memory_order_seq_cst);
    if (team.sleeping.load(std::memory_order_seq_cst) > 0) wake_all(team.signal);
}

}  // namespace

int pool_threads() { return team.wanted.load() + 1; }

void pool_resize(int threads) {
    std::lock_guard<std::mutex> lock(team.busy);
    bool forked = team.owner.load() != getpid();  // a child process has none of its parent's threads
    if (forked) team.alive = 0;
    team.owner = getpid();
    team.wanted = 0;
    announce();
    while (team.alive.load() > 0) sched_yield();
    team.wanted = threads - 1;
    for (int i = 0; i < threads - 1; i++) {
        team.alive.fetch_add(1);
        std::thread(help, i).detach();
    }
}

void pool_run(int64_t pieces, Task task, void* context) {
    std::unique_lock<std::mutex> lock(team.busy, std::try_to_lock);
    auto began = Clock::now();
    if (pieces <= 1 || team.wanted.load(std::memory_order_relaxed) == 0 || !lock.owns_lock() || began < team.rested) {
        for (int64_t i = 0; i < pieces; i++) task(context, i);
        return;
    }
    team.task.store(task, std::memory_order_relaxed);
    team.context.store(context, std::memory_order_relaxed);
    team.pieces.store(pieces, std::memory_order_relaxed);
    team.finished.store(0, std::memory_order_relaxed);
    uint64_t generation = (team.open.load(std::memory_order_relaxed) >> 32) + 1;
    team.open.store(generation << 32 | static_cast<uint64_t>(pieces), std::memory_order_seq_cst);
    announce();
    int64_t own = work();
    auto done = Clock::now();
    while (team.finished.load(std::memory_order_acquire) < pieces) {
        if (Clock::now() - done < SPIN)
            _mm_pause();
        else
            sched_yield();  // a helper that holds a piece is not running: let it
    }
    auto end = Clock::now();
    if (end - done > microseconds(100) + 3 * (done - began) / std::max<int64_t>(own, 1)) {
        team.rested = end + team.rest;
        team.rest = std::min<Clock::duration>(2 * team.rest, LONGEST_REST);
    } else if (own < pieces) {
        team.rest = std::max<Clock::duration>(team.rest - microseconds(20), SHORTEST_REST);
    }
}

namespace {
struct Scratch {
    void* memory[8] = {};
    int64_t size[8] = {};
    ~Scratch() {
        for (void* m : memory) free(m);
    }
};
thread_local Scratch local;
}  // namespace

void* scratch(int slot, int64_t bytes) {
    if (local.size[slot] < bytes) {
        free(local.memory[slot]);
        int64_t size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
        local.memory[slot] = aligned_alloc(4096, size);
        if (local.memory[slot] == nullptr) abort();
        local.size[slot] = size;
    }
    return local.memory[slot];
}
