// A loop over tasks on PyTorch's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

// GOMP_parallel of the OpenMP library that PyTorch has loaded, or null. Called by its address, because a library linked to
// OpenMP here could be another copy, whose threads would wait beside PyTorch's and take turns with them.
using Fork = void (*)(void (*function)(void *), void *data, unsigned threads, unsigned flags);
static Fork fork_threads = nullptr;

// Call task(number, thread) for all numbers below `tasks`, in any order; `thread` counts from 0 and is below `threads`. No
// task may depend on another, so that results do not depend on the number of threads.
template <class Task> static void parallel(int64_t tasks, int64_t threads, Task task) {
    if (std::min(tasks, threads) <= 1 || !fork_threads) {
        for (int64_t i = 0; i < tasks; ++i) task(i, 0);
        return;
    }
    struct Shared {
        Task &task;
        int64_t tasks;
        std::atomic<int64_t> next, thread;
    } shared{task, tasks, {0}, {0}};
    const auto work = [](void *data) {
        Shared &all = *static_cast<Shared *>(data);
        const int64_t thread = all.thread++;
        for (int64_t i = all.next++; i < all.tasks; i = all.next++) all.task(i, thread);
    };
    fork_threads(work, &shared, static_cast<unsigned>(std::min(tasks, threads)), 0);
}
