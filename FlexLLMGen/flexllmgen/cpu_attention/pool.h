// Threads that sleep between calls: one that spun would take time from the thread that issues GPU work.
#pragma once
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
   public:
    std::mutex one_caller;  // Held by whoever uses the pool or its memory.

    // Memory for one call; kept, as getting it anew would cost page faults.
    float* memory(size_t floats) {
        if (memory_.size() < floats) memory_ = std::vector<float>(floats);
        return memory_.data();
    }

    // Runs work(0), work(1), ... work(threads - 1) at once, the first on this thread.
    void run(int threads, const std::function<void(int)>& work) {
        if (threads <= 1) return work(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (count_ < threads - 1) {
                const int index = ++count_;
                std::thread(&Pool::serve, this, index, round_).detach();
            }
            work_ = &work;
            wanted_ = threads - 1;
            running_ = wanted_;
            ++round_;
        }
        wake_.notify_all();
        work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return running_ == 0; });
        work_ = nullptr;
    }

    // The process's pool. It is never destroyed: its threads sleep until the process ends. A forked child has
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
    static std::atomic<Pool*>& current() {
        static std::atomic<Pool*> pool{nullptr};
        return pool;
    }

    void serve(int index, uint64_t seen) {
        for (;;) {
            const std::function<void(int)>* work;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                if (index > wanted_) continue;
                work = work_;
            }
            (*work)(index);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::vector<float> memory_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int)>* work_ = nullptr;
    uint64_t round_ = 0;
    int count_ = 0, wanted_ = 0, running_ = 0;
};
