// Attention of a decode step on the CPU: a plain C interface, for ctypes.
//
// A library is built for the instructions of one level, FLEX_LEVEL of library.py, and serves where they are. It is compiled
// in parts at once, FLEX_PART of build.py, each for one type of keys and values.

#ifndef FLEX_PART
#error "FLEX_PART says which part to compile (build.py)"
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if FLEX_LEVEL > 0
#include <immintrin.h>
#endif

#include "numbers.h"
#include "pool.h"

constexpr float LOG2E = 1.44269504088896f;
constexpr float LOWEST = -1e30f;  // Below every score; finite, so that differences are numbers.
constexpr float LEAST_POWER = -126;  // Powers of two under it count as nothing.
constexpr int BLOCK = 16;                  // positions whose keys are read before their values
constexpr int LONG_BLOCK = 32;             // where many queries share them
constexpr int CODE_BLOCK = 64;             // and codes are multiplied in tiles
constexpr int64_t BLOCK_BYTES = 64 << 10;   // keys read together: they and their values stay near the core
constexpr int64_t QUERY_BYTES = 128 << 10;  // queries and sums that go with them
constexpr int MIN_GROUP = 64;  // of codes
constexpr int64_t READ_BYTES = 4 << 20;
constexpr int64_t MIN_CHUNK = 64;        // positions
constexpr int64_t TASKS_A_THREAD = 48;   // at most, so that threads end together
constexpr int64_t THREAD_BYTES = 128 << 10;  // Waking a thread for less costs more than it reads.

// Key heads [head, head + heads) of a sequence over positions [first, stop).
struct Piece {
    int64_t sequence, head;
    int heads;
    int64_t first, stop;
};

// Bytes from a position to the next, from its keys to its values, from a sequence to the next.
struct Strides {
    int64_t position, half, sequence;

    // Where a piece's part of a position's keys (half 0) or values (1) begins; a head has `head_bytes`.
    int64_t at(const Piece& piece, int64_t which, int64_t which_half, int64_t head_bytes) const {
        return which * position + which_half * half + piece.sequence * sequence + piece.head * head_bytes;
    }
};

// A call, laid out as its Python side has it (library.py).
struct Call {
    const char *q;
    char* kv;
    const char *scale, *zero;
    const float* bias;
    char* out;
    const char *k_new, *v_new;  // [B, K, H], written at the last position before it is read; or none
    const char *codes_new, *scale_new, *zero_new;  // the same of codes: [B, 2, K, H], and [B, 2, K, groups] in fp16
    Strides kv_bytes, scale_bytes, zero_bytes;
    int64_t bias_stride;  // of a sequence, in numbers
    int64_t B, N, K, H, first, length, groups, group_size;
    int64_t q_type, kv_type;  // 0 fp32, 1 fp16, 2 bf16, 3 codes
    int64_t threads;
    float factor;
};

template <class F>
inline void by_type(int64_t type, F&& f) {
    if (type == 0) f(F32{});
    if (type == 1) f(F16{});
    if (type == 2) f(BF16{});
    if (type == 3) f(U8{});
}

template <class F>
inline void by_query_type(const Call& c, F&& f) {
    by_type(c.q_type, [&](auto type) {
        if constexpr (!std::is_same_v<decltype(type), U8>) f(type);
    });
}

// Tasks of one unit that a thread does as one piece.
struct Taken {
    int64_t task = 0, count = 0;
};

// Positions of a block, and the most key heads of a piece.
struct Limits {
    int block;
    int64_t heads;
};

// How a call is cut: a unit is some heads of a sequence, a unit's positions are chunks, each a task.
struct Plan {
    int64_t parts, chunks, chunk, units;
    int heads, block, threads;

    Plan(const Call& c, const Limits& limits) : block(limits.block) {
        static constexpr int64_t sizes[] = {4, 2, 2, 1};
        const int64_t queries = c.N / c.K, row = c.H * sizes[c.kv_type], positions = c.length - c.first;
        const int64_t fitting = std::min(BLOCK_BYTES / (BLOCK * row), QUERY_BYTES / (queries * c.H * 8));
        const int64_t most = std::max<int64_t>(1, std::min(fitting, limits.heads));
        parts = (c.K + most - 1) / most;
        heads = int((c.K + parts - 1) / parts);
        parts = (c.K + heads - 1) / heads;
        units = c.B * parts;
        threads = int(std::max<int64_t>(1, std::min(c.threads, 2 * positions * c.B * c.K * row / THREAD_BYTES)));
        const int64_t wanted = threads == 1 ? 1 : (threads * TASKS_A_THREAD + units - 1) / units;
        chunks = std::max<int64_t>(1, std::min(wanted, positions / MIN_CHUNK));
        chunk = (positions + chunks - 1) / chunks;
        chunk = (chunk + block - 1) / block * block;
        chunks = (positions + chunk - 1) / chunk;
    }
    int64_t tasks() const { return units * chunks; }
    // What was taken as one piece, of no positions if that is nothing.
    Piece piece(const Call& c, const Taken& taken) const {
        const int64_t unit = taken.task / chunks, part = unit % parts, first = c.first + taken.task % chunks * chunk;
        return Piece{unit / parts, part * heads, int(std::min<int64_t>(heads, c.K - part * heads)), first,
                     std::min(first + taken.count * chunk, c.length)};
    }
};

// Of some queries: sums of weighted values, largest scores, sums of weights.
struct Partial {
    float *acc, *m, *l;

    static Partial at(float* memory, const Call& c, const Plan& plan) {
        const int64_t queries = plan.heads * (c.N / c.K);
        return Partial{memory, memory + queries * c.H, memory + queries * (c.H + 1)};
    }
};

struct Shared {
    std::atomic<int64_t> next{0};
    float* sums;
    std::atomic<int>* left;  // tasks of each unit that have not ended
    int* taken;              // of a task from which on some were done as one piece: how many

    Shared(const Call& c, const Plan& plan, Pool& pool) {
        const size_t floats = plan.chunks > 1 ? size_t(plan.tasks() * stride(c, plan)) : 0;
        char* memory = pool.memory(floats * 4 + size_t(plan.units) * sizeof(*left) + size_t(plan.tasks()) * 4);
        sums = reinterpret_cast<float*>(memory);
        left = reinterpret_cast<std::atomic<int>*>(sums + floats);
        taken = reinterpret_cast<int*>(left + plan.units);
        for (int64_t i = 0; i < plan.units; ++i) new (left + i) std::atomic<int>(int(plan.chunks));
    }
    // Takes tasks of one unit, at once as long as there is much left, one by one in the end; `ahead`, before the thread has
    // done what it took before, as long as whole units are taken: threads shall end together.
    Taken take(const Plan& plan, bool ahead = false) {
        for (int64_t task = next.load(); task < plan.tasks();) {
            const int64_t fair = (plan.tasks() - task) / (2 * plan.threads);
            if (ahead && fair < plan.chunks) break;
            const int64_t count = std::min(plan.chunks - task % plan.chunks, std::max<int64_t>(1, fair));
            if (next.compare_exchange_weak(task, task + count)) return Taken{task, count};
        }
        return Taken{};
    }
    static int64_t stride(const Call& c, const Plan& plan) {
        return (plan.heads * (c.N / c.K) * (c.H + 2) + 15) / 16 * 16;
    }
    Partial partial(const Call& c, const Plan& plan, int64_t task) const {
        return Partial::at(sums + task * stride(c, plan), c, plan);
    }
};

// Writes the last position's keys and values, of a piece that it belongs to.
inline void append(const Call& c, const Piece& piece) {
    static constexpr int64_t sizes[] = {4, 2, 2, 1};
    const int64_t last = c.length - 1, head = c.H * sizes[c.kv_type], of_groups = c.groups * 2;
    const auto copy = [&](const char* to, const Strides& strides, int half, const char* from, int64_t row, int64_t bytes) {
        if (from)
            std::memcpy(const_cast<char*>(to) + strides.at(piece, last, half, bytes), from + (row * c.K + piece.head) * bytes,
                        size_t(piece.heads * bytes));
    };
    for (int half = 0; half < 2; ++half) {
        copy(c.kv, c.kv_bytes, half, half ? c.v_new : c.k_new, piece.sequence, head);
        copy(c.kv, c.kv_bytes, half, c.codes_new, 2 * piece.sequence + half, head);
        copy(c.scale, c.scale_bytes, half, c.scale_new, 2 * piece.sequence + half, of_groups);
        copy(c.zero, c.zero_bytes, half, c.zero_new, 2 * piece.sequence + half, of_groups);
    }
}

#if FLEX_LEVEL == 0
namespace generic {
#include "vectors_generic.h"
#include "tiles.h"
#include "attend.h"
}  // namespace generic
namespace level = generic;
#elif FLEX_LEVEL == 1
namespace avx2 {
#include "vectors_avx2.h"
#include "tiles.h"
#include "attend.h"
}  // namespace avx2
namespace level = avx2;
#elif FLEX_LEVEL == 2
namespace avx512 {
#include "vectors_avx512.h"
#include "tiles.h"
#include "attend.h"
}  // namespace avx512
namespace level = avx512;
#elif FLEX_LEVEL == 3
#define BF16_DOTS
namespace avx512_bf16 {
#include "vectors_avx512.h"
#include "tiles.h"
#include "dots.h"
#include "codes.h"
#include "code_values.h"
#include "attend.h"
}  // namespace avx512_bf16
namespace level = avx512_bf16;
#elif FLEX_LEVEL == 4
#define BF16_DOTS
#define AMX
namespace amx {
#include "vectors_avx512.h"
#include "tiles.h"
#include "amx.h"
#include "dots.h"
#include "matrix.h"
#include "codes.h"
#include "code_values.h"
#include "code_matrix.h"
#include "attend.h"
}  // namespace amx
namespace level = amx;
#endif

#if FLEX_PART == 0
extern "C" {

void flex_attend(const Call* call) {
    const Call& c = *call;
    const Plan plan(c, level::limits_of(c));
    Pool& pool = Pool::of_process();
    const std::lock_guard<std::mutex> lock(pool.one_caller);
    Shared shared(c, plan, pool);
    pool.run(plan.threads, [&](int) { level::attend(c, plan, shared); });
}

// Reads memory: the rate that the attention is held against. Returns the sum of what it read.
float flex_read(const char* from, int64_t bytes, int64_t threads) {
    Pool& pool = Pool::of_process();
    const std::lock_guard<std::mutex> lock(pool.one_caller);
    std::vector<float> sums(static_cast<size_t>(threads));
    std::atomic<int64_t> next{0};
    pool.run(int(threads), [&](int index) {
        for (int64_t at; (at = next.fetch_add(READ_BYTES)) < bytes;) {
            const int64_t now = std::min(READ_BYTES, bytes - at);
            sums[size_t(index)] += level::read_all(from + at, now);
        }
    });
    float total = 0;
    for (float each : sums) total += each;
    return total;
}
}
#endif
