// Threads that wait for calls: awake for a short time after each, so that calls that follow one another closely need
// not wake them, and asleep after that.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

// Until `ready` holds, or for a while; returns whether it holds.
template <class F>
inline bool spin(F&& ready) {
    static constexpr std::chrono::microseconds LONGEST{200};
    const auto end = std::chrono::steady_clock::now() + LONGEST;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

class Pool {
   public:
    std::mutex one_caller;  // Held by whoever uses the pool or its memory.

    // Memory for one call; kept, as getting it anew would cost page faults.
    char* memory(size_t bytes) {
        if (memory_.size() < bytes + 64) memory_ = std::vector<char>(bytes + 64);
        return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64);
    }

    // Runs work(0), work(1), ... work(threads - 1) at once, the first on this thread.
    template <class F>
    void run(int threads, const F& work) {
        if (threads <= 1) return work(0);
        // Not where waiting would take a core from whoever else runs.
        const bool awake = threads < cores_;
        while (count_ < threads - 1) {
            const int index = ++count_;
            std::thread(&Pool::serve, this, index, state_.load()).detach();
        }
        work_ = [](const void* it, int index) { (*static_cast<const F*>(it))(index); };
        argument_ = &work;
        running_.store(threads - 1);
        state_.store((state_.load() / ROUND + 1) * ROUND + uint64_t(awake) * AWAKE + uint64_t(threads - 1));
        {
            // Who has seen the former state is asleep once this is held.
            const std::lock_guard<std::mutex> lock(mutex_);
        }
        if (asleep_.load() > 0) wake_.notify_all();
        work(0);
        const auto ended = [&] { return running_.load() == 0; };
        if (awake && spin(ended)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, ended);
    }

    // The process's pool. It is never destroyed: its threads wait until the process ends. A forked child has
    // none of them, and gets a pool of its own.
    static Pool& of_process() {
        static std::once_flag once;
        std::call_once(once, [] {
            current().store(new Pool);
            pthread_atfork(nullptr, nullptr, [] { current().store(new Pool); });
        });
        return *current().load();
    }

   private:
    // A state is a call's number, whether its threads stay awake after it, and how many it wants: one value, since a
    // thread that is not wanted may read it while the next call is being set up.
    static constexpr uint64_t AWAKE = 1 << 15, ROUND = 1 << 16;

    static std::atomic<Pool*>& current() {
        static std::atomic<Pool*> pool{nullptr};
        return pool;
    }

    static int count_cores() {
#if defined(__linux__)
        cpu_set_t mine;
        if (!sched_getaffinity(0, sizeof mine, &mine)) return CPU_COUNT(&mine);
#endif
        return int(std::thread::hardware_concurrency());
    }

    void serve(int index, uint64_t seen) {
        bool awake = false;
        for (;;) {
            const auto called = [&] { return state_.load() != seen; };
            if (!awake || !spin(called)) {
                std::unique_lock<std::mutex> lock(mutex_);
                asleep_.fetch_add(1);
                wake_.wait(lock, called);
                asleep_.fetch_sub(1);
            }
            seen = state_.load();
            const bool wanted = index <= int(seen % AWAKE);
            awake = wanted && (seen & AWAKE);
            if (!wanted) continue;
            work_(argument_, index);
            if (running_.fetch_sub(1) != 1) continue;
            const std::lock_guard<std::mutex> lock(mutex_);
            done_.notify_one();
        }
    }

    std::vector<char> memory_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    void (*work_)(const void*, int) = nullptr;
    const void* argument_ = nullptr;
    std::atomic<uint64_t> state_{0};
    std::atomic<int> running_{0}, asleep_{0};
    const int cores_ = count_cores();
    int count_ = 0;
};
