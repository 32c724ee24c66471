// One block at a time of a grid: its threads are contexts that take turns, change at barriers and where a warp works
// together, and nowhere else. Reports what a GPU would do wrong in silence: warps that diverge, barriers that not all
// reach, addresses outside of shared memory. Knows no instruction.
//
// Two orders of the threads and two times at which an asynchronous copy lands (at once, as late as it may) bring a
// missing barrier or wait to light: results must not depend on them.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

struct Index {
    int x, y, z;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct Copy {
    void* to;
    const void* from; // none: zeros
    int bytes;
};

struct Grid {
    int x, y, z, threads, shared_bytes;
};

class Machine {
  public:
    bool late_copies = false, reversed = false;

    uint8_t* shared() { return (uint8_t*)(((uintptr_t)storage.data() + 127) / 128 * 128); }

    void launch(Grid grid, const std::function<void()>& kernel) {
        gridDim = {grid.x, grid.y, grid.z};
        blockDim = {grid.threads, 1, 1};
        body = &kernel;
        shared_bytes = grid.shared_bytes;
        threads.resize(grid.threads);
        warps.assign(grid.threads / 32, {});
        for (int z = 0; z < grid.z; z++)
            for (int y = 0; y < grid.y; y++)
                for (int x = 0; x < grid.x; x++) {
                    blockIdx = {x, y, z};
                    storage.assign(grid.shared_bytes + 128, 0xff); // no number, in every type
                    run_block();
                }
    }

    // Waits until all lanes of this warp are here, for one of them to compute for all.
    template <class Lane, class Compute>
    void together(const char* operation, Lane& own, Compute compute) {
        Warp& warp = warps[current / 32];
        if (warp.arrived == 0) warp.operation = operation;
        require(warp.operation == operation, "lanes of a warp diverge");
        warp.lanes[current % 32] = &own;
        uint64_t turn = warp.turn;
        if (++warp.arrived < 32) {
            while (warp.turn == turn) give_way(current / 32 * 32, 32);
            return;
        }
        Lane* lanes[32];
        for (int i = 0; i < 32; i++) lanes[i] = (Lane*)warp.lanes[i];
        compute(lanes);
        warp.arrived = 0;
        warp.turn++;
        idle = 0;
    }

    void barrier() {
        uint64_t turn = barriers;
        int first = current / 32 * 32;
        warps[current / 32].at_barrier++;
        if (++waiting < (int)threads.size()) {
            // A warp goes on to where it has to wait before another moves: as far ahead of the rest as it can get.
            while (barriers == turn)
                if (warps[first / 32].at_barrier < 32)
                    give_way(first, 32);
                else
                    give_way(0, (int)threads.size());
            return;
        }
        for (Warp& warp : warps) warp.at_barrier = 0;
        waiting = 0;
        barriers++;
        idle = 0;
    }

    void copy(Copy copy) {
        if (late_copies)
            threads[current].open.push_back(copy);
        else
            land(copy);
    }
    void commit() {
        Thread& own = threads[current];
        own.groups.push_back(std::move(own.open));
        own.open.clear();
    }
    void wait(int groups) {
        Thread& own = threads[current];
        while ((int)own.groups.size() > groups) {
            for (Copy& copy : own.groups.front()) land(copy);
            own.groups.erase(own.groups.begin());
        }
    }

    void require_shared(const void* at, int bytes) {
        bool inside = at >= shared() && (const uint8_t*)at + bytes <= shared() + shared_bytes;
        require(inside, "outside of shared memory");
    }
    void require(bool holds, const char* what) {
        if (holds) return;
        std::fprintf(stderr, "block (%d, %d, %d), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, current, what);
        std::exit(1);
    }

  private:
    struct Thread {
        std::vector<uint8_t> stack = std::vector<uint8_t>(64 << 10);
        ucontext_t start;
        jmp_buf at;
        bool started, done;
        std::vector<Copy> open;
        std::vector<std::vector<Copy>> groups;
    };
    struct Warp {
        int arrived = 0, at_barrier = 0;
        uint64_t turn = 0;
        const char* operation = nullptr;
        void* lanes[32];
    };
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<uint8_t> storage;
    const std::function<void()>* body = nullptr;
    jmp_buf launcher;
    int current = 0, waiting = 0, finished = 0, shared_bytes = 0, idle = 0;
    uint64_t barriers = 0;

    static void land(const Copy& copy) {
        if (copy.from)
            std::memcpy(copy.to, copy.from, copy.bytes);
        else
            std::memset(copy.to, 0, copy.bytes);
    }

    void run_block() {
        finished = waiting = idle = 0;
        for (Thread& thread : threads) {
            thread.started = thread.done = false;
            getcontext(&thread.start);
            thread.start.uc_stack.ss_sp = thread.stack.data();
            thread.start.uc_stack.ss_size = thread.stack.size();
            makecontext(&thread.start, &Machine::enter, 0);
        }
        if (_setjmp(launcher) == 0) resume(reversed ? (int)threads.size() - 1 : 0);
        for (Warp& warp : warps) require(warp.arrived == 0, "a warp waits for lanes that have ended");
    }

    static void enter();

    void run_thread() {
        (*body)();
        threads[current].done = true;
        threads[current].open.clear();
        threads[current].groups.clear();
        idle = 0;
        if (++finished == (int)threads.size()) _longjmp(launcher, 1);
        give_way(0, (int)threads.size());
    }

    // To the next thread of `count` from `first` that has not ended; to any, if all of those have.
    void give_way(int first, int count) {
        require(++idle < 100000, "threads wait for each other: a barrier or a warp's work that not all reach");
        int step = reversed ? count - 1 : 1, next = current;
        do next = first + (next - first + step) % count;
        while (threads[next].done && next != current);
        if (idle % 1000 == 999) next = (current + 1) % (int)threads.size(); // out of a warp that waits for another
        if (threads[next].done || next == current) return wander();
        if (_setjmp(threads[current].at) == 0) resume(next);
    }

    void wander() {
        int next = current, count = (int)threads.size();
        do next = (next + 1) % count;
        while (threads[next].done && next != current);
        if (next != current && _setjmp(threads[current].at) == 0) resume(next);
    }

    [[noreturn]] void resume(int thread) {
        current = thread;
        threadIdx = {thread, 0, 0};
        Thread& next = threads[thread];
        if (next.started) _longjmp(next.at, 1);
        next.started = true;
        setcontext(&next.start);
        std::abort();
    }
};

inline Machine machine;
inline void Machine::enter() { machine.run_thread(); }
