#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
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

// What there is to do, on the lines that helpers watch: one look brings all of it. `generation` is odd while the rest
// is written; a reader that finds it unchanged after reading has read what belongs together.
struct Work {
    Task task;
    int32_t members, cpu;  // cpu: where the caller runs
    int64_t pieces;
    uint64_t context[CONTEXT_WORDS];
};
constexpr int WORDS = sizeof(Work) / 8;

// A member's share of the pieces. `open` packs a generation (high 40 bits) and how many of the share are not claimed yet
// in it (low 24 bits); an older generation there means that nobody has claimed any. Each member works off its own share,
// on a cache line that the others leave alone, and takes from others only when they are late: a line costs some 200 ns
// to come from another core, and a region of a small model's step lasts a few microseconds.
struct Member {
    alignas(64) std::atomic<uint64_t> open{0};
    alignas(64) std::atomic<uint64_t> done{0};  // pieces ever done by this member, whoever's they were
};

constexpr int MOST = 256;        // members
constexpr int LATE = 40;         // pauses (about a microsecond) after which others' pieces are taken
constexpr uint64_t LEFT = (1 << 24) - 1;

struct Team {
    alignas(128) std::atomic<uint64_t> generation{0};
    std::atomic<uint64_t> work[WORDS] = {};
    alignas(128) std::atomic<int> sleeping{0};
    std::atomic<int> wanted{0};  // helpers beyond this many leave
    std::atomic<int> alive{0};
    std::atomic<pid_t> owner{0};
    std::mutex busy;  // guards what follows, too
    uint64_t given = 0;  // pieces ever
    int patience = LATE;  // none, as long as no helper comes: the system does not run them
    Clock::time_point rested{};
    Clock::duration rest = SHORTEST_REST;
    Member member[MOST];
};

Team& team = *new Team;  // never destroyed: helpers may outlive main

// Sleepers wait for a change of the generation's low half.
void sleep_until_changed(uint64_t seen) {
    syscall(SYS_futex, &team.generation, FUTEX_WAIT_PRIVATE, static_cast<uint32_t>(seen), nullptr, nullptr, 0);
}

void wake_sleepers() {
    if (team.sleeping.load(std::memory_order_relaxed) > 0)
        syscall(SYS_futex, &team.generation, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

// A sleeper that is overlooked here sleeps through this work; it is woken for the next.
void publish(const Work& work) {
    uint64_t words[WORDS], generation = team.generation.load(std::memory_order_relaxed);
    memcpy(words, &work, sizeof(work));
    team.generation.store(generation + 1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    for (int i = 0; i < WORDS; i++) team.work[i].store(words[i], std::memory_order_relaxed);
    team.generation.store(generation + 2, std::memory_order_release);
    wake_sleepers();
}

bool read(uint64_t generation, Work& work) {
    uint64_t words[WORDS];
    for (int i = 0; i < WORDS; i++) words[i] = team.work[i].load(std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_acquire);
    memcpy(&work, words, sizeof(work));
    return team.generation.load(std::memory_order_relaxed) == generation;
}

int64_t share_end(const Work& work, int64_t member) { return work.pieces * (member + 1) / work.members; }

// A piece of a member's share, or -1 where none is left in this generation or it is over.
int64_t claim(const Work& work, uint64_t generation, int member) {
    std::atomic<uint64_t>& share = team.member[member].open;
    uint64_t open = share.load(std::memory_order_acquire), end = share_end(work, member);
    for (;;) {
        int64_t newer = static_cast<int64_t>((open & ~LEFT) - (generation << 24));
        uint64_t left = newer > 0 ? 0 : newer == 0 ? open & LEFT : end - share_end(work, member - 1);
        if (left == 0) return -1;
        if (share.compare_exchange_weak(open, generation << 24 | (left - 1), std::memory_order_acq_rel, std::memory_order_acquire))
            return end - left;
    }
}

// Runs what is left of `whose` share; returns how many pieces.
int64_t run(Work& work, uint64_t generation, int me, int whose) {
    int64_t count = 0;
    for (int64_t piece; (piece = claim(work, generation, whose)) >= 0; count++) work.task(work.context, piece);
    std::atomic<uint64_t>& done = team.member[me].done;
    if (count) done.store(done.load(std::memory_order_relaxed) + count, std::memory_order_release);
    return count;
}

// The generation after `seen`: watched for, then slept for.
uint64_t next(uint64_t seen) {
    auto since = Clock::now();
    for (int i = 1;; i++) {
        uint64_t now = team.generation.load(std::memory_order_acquire);
        if (now != seen && now % 2 == 0) return now;
        _mm_pause();
        if (i % 64 || Clock::now() - since < SPIN) continue;
        team.sleeping.fetch_add(1, std::memory_order_seq_cst);
        sleep_until_changed(seen);
        team.sleeping.fetch_sub(1, std::memory_order_seq_cst);
        since = Clock::now();
    }
}

// Sleepers are often woken on the caller's processor, where they would wait for it to end its turn: away from there, and
// from then on, until the caller moves.
void leave(int cpu, cpu_set_t allowed) {
    CPU_CLR(cpu, &allowed);
    if (CPU_COUNT(&allowed) > 0) sched_setaffinity(0, sizeof(allowed), &allowed);
}

void help(int me) {
    Work work;
    cpu_set_t allowed;
    bool moves = sched_getaffinity(0, sizeof(allowed), &allowed) == 0;  // not where there are more than 1,024 processors
    for (uint64_t seen = 0;;) {
        seen = next(seen);
        if (me > team.wanted.load(std::memory_order_acquire)) break;
        if (!read(seen, work)) continue;
        if (moves && work.cpu == sched_getcpu()) leave(work.cpu, allowed);
        for (int m = 0; m < work.members; m++) run(work, seen, me, (me + m) % work.members);
    }
    team.alive.fetch_sub(1);
}

bool finished(const Work& work) {
    uint64_t sum = 0;
    for (int m = 0; m < work.members; m++) sum += team.member[m].done.load(std::memory_order_acquire);
    return sum == team.given;
}

// Waits for the others' pieces, after a while doing them, then letting them run.
void join(Work& work, uint64_t generation, Clock::time_point began, int64_t own) {
    for (int i = 0; i < team.patience; i++) {
        if (finished(work)) return;
        _mm_pause();
    }
    for (int m = 1; m < work.members; m++) own += run(work, generation, 0, m);
    team.patience = own < work.pieces ? LATE : 0;
    auto done = Clock::now();
    while (!finished(work)) {
        if (Clock::now() - done < SPIN)
            _mm_pause();
        else
            sched_yield();  // a helper that holds a piece is not running: let it
    }
    auto end = Clock::now();
    if (end - done > microseconds(100) + 3 * (done - began) / std::max<int64_t>(own, 1)) {
        team.rested = end + team.rest;
        team.rest = std::min<Clock::duration>(2 * team.rest, LONGEST_REST);
    } else {
        team.rest = std::max<Clock::duration>(team.rest - microseconds(20), SHORTEST_REST);
    }
}

}  // namespace

int pool_threads() { return team.wanted.load() + 1; }

void pool_resize(int threads) {
    std::lock_guard<std::mutex> lock(team.busy);
    threads = std::min(threads, MOST);
    bool forked = team.owner.load() != getpid();  // a child process has none of its parent's threads
    if (forked) team.alive = 0;
    team.owner = getpid();
    team.wanted = 0;
    publish(Work{nullptr, 1, -1, 0, {}});
    while (team.alive.load() > 0) {
        sched_yield();
        wake_sleepers();
    }
    for (Member& member : team.member) member.done = 0;
    team.given = 0;
    team.sleeping = 0;
    team.wanted = threads - 1;
    for (int i = 1; i < threads; i++) {
        team.alive.fetch_add(1);
        std::thread(help, i).detach();
    }
}

void pool_wake() { wake_sleepers(); }

void pool_run(int64_t pieces, Task task, const void* context, int64_t bytes) {
    Work work{task, pool_threads(), sched_getcpu(), pieces, {}};
    memcpy(work.context, context, bytes);
    std::unique_lock<std::mutex> lock(team.busy, std::defer_lock);
    Clock::time_point began;
    if (pieces <= 1 || work.members == 1 || !lock.try_lock() || (began = Clock::now()) < team.rested) {
        for (int64_t i = 0; i < pieces; i++) task(work.context, i);
        return;
    }
    team.given += pieces;
    publish(work);
    uint64_t generation = team.generation.load(std::memory_order_relaxed);
    int64_t own = run(work, generation, 0, 0);
    join(work, generation, began, own);
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
