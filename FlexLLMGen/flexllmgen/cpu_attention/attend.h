// Pieces of a call; included after tiles.h.
//
// A piece is some key heads of one sequence over some positions. Its rows are read once, a few positions at a time, first
// the keys of all its heads, then the values, while the next positions are fetched. Softmax runs along (a score that is
// nearly the largest and the sum so far are kept, Milakov and Gimelshein 2018); what pieces of a sequence found is put
// together by their largest scores.

#ifndef BF16_DOTS
inline bool by_dots(const Call&) { return false; }
inline bool by_codes(const Call&) { return false; }
inline int64_t packed_codes(const Call&) { return 0; }
#endif

#ifndef AMX
constexpr int GROUPS = 0;
inline bool in_code_tiles(const Call&) { return false; }
#endif

inline Limits limits_of(const Call& c) {
    if (in_code_tiles(c)) return {CODE_BLOCK, GROUPS / c.groups};
    return {c.N / c.K >= 4 || c.groups ? LONG_BLOCK : BLOCK, c.K};
}

// Scales, or zeros, that a position of some heads has room for.
inline int groups_a_row(const Call& c, int heads) { return in_code_tiles(c) ? GROUPS : heads * int(c.groups); }

// What a thread works with.
struct Bench {
    std::vector<float> memory;
    float *q, *score, *alpha, *scale, *zero, *sums;
    std::vector<Row> rows;

    void size(const Call& c, const Plan& plan) {
        const size_t queries = size_t(plan.heads) * (c.N / c.K), rows_now = size_t(plan.heads) * plan.block;
        const size_t scores = queries * plan.block + 2 * 8 * NR;
        const size_t groups = 2 * size_t(plan.block) * groups_a_row(c, plan.heads) + 2 * NR;
        const size_t packed = size_t(plan.heads) * size_t(std::max(packed_floats(c), packed_codes(c)));
        const size_t each = (queries + 2 * NR + 15) / 16 * 16;
        memory.resize(packed + scores + each + 2 * groups + size_t(Shared::stride(c, plan)) + 16);
        float* at = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        q = at, at += packed;
        score = at, at += scores;
        alpha = at, at += each;
        scale = at, at += groups;
        zero = at, at += groups;
        sums = at;
        rows.resize(2 * rows_now);
    }
};

template <class Q>
inline void pack_queries(Q type, const Call& c, const Piece& piece, float* q) {
    const int queries = int(c.N / c.K);
    const V factor = Simd::set1(c.factor * LOG2E);
    for (int h = 0; h < piece.heads; ++h) {
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            const int64_t first = int64_t(h) * queries + g0;
            float* to = q + h * packed_floats(c);
            for (int g = 0; g < GT; ++g) {
                const char* from =
                    c.q + ((piece.sequence * c.N + int64_t(piece.head) * queries) + first + g) * c.H * Q::size;
                float* sums = to + queries * c.H + (g0 + g) * c.groups * W;
                V sum = Simd::zero();
                for (int column = 0; column < c.H / W; ++column) {
                    const V x = Simd::mul(factor, Simd::get(type, from + column * W * Q::size));
                    Simd::store(to + g0 * c.H + (column * GT + g) * W, x);
                    if (!c.groups) continue;
                    sum = column * W % c.group_size ? Simd::fma(x, Simd::set1(1.0f), sum) : x;
                    Simd::store(sums + column * W / c.group_size * W, sum);
                }
            }
        });
    }
}

// Writes whole vectors, so that up to W - 1 floats past the last are written too.
inline void widen(const char* from, int count, float* to) {
    int i = 0;
    for (; i + W <= count; i += W) Simd::store(to + i, Simd::get(F16{}, from + 2 * i));
    if (i < count) Simd::store(to + i, Simd::some_halves(from + 2 * i, count - i));
}

// Where a piece's keys (half 0) or values (1) of a position begin.
template <class T>
inline const char* rows_of(const Call& c, const Piece& piece, int64_t position, int half) {
    return c.kv + c.kv_bytes.at(piece, position, half, c.H * T::size);
}

// Rows of a block's positions: keys [head][block], then values.
template <class T>
inline void find_rows(const Call& c, const Piece& piece, int64_t position, int block, Bench& bench) {
    const int rows = piece.heads * block, groups = int(c.groups) * piece.heads;
    for (int half = 0; half < 2; ++half) {
        for (int p = 0; p < block; ++p) {
            const int64_t skip = (half * block + p) * groups;
            const char* data = rows_of<T>(c, piece, position + p, half);
            for (int h = 0; h < piece.heads; ++h)
                bench.rows[half * rows + h * block + p] =
                    Row{data + h * c.H * T::size, bench.scale + skip + h * c.groups, bench.zero + skip + h * c.groups,
                        bench.q + h * packed_floats(c)};
        }
    }
}

// Where the scales, or the zeros, of a piece's keys or values of a block begin, and how far positions lie apart.
struct Groups {
    const char* data;
    int64_t step;
};

inline Groups groups_of(const Call& c, const Piece& piece, int64_t position, int half, bool zeros) {
    const Strides& bytes = zeros ? c.zero_bytes : c.scale_bytes;
    return {(zeros ? c.zero : c.scale) + bytes.at(piece, position, half, c.groups * 2), bytes.position};
}

// Scales and zeros of a block's codes as fp32.
inline void find_groups(const Call& c, const Piece& piece, int64_t position, int block, Bench& bench) {
    const int groups = int(c.groups) * piece.heads;
    for (int half = 0; half < 2; ++half) {
        for (bool zeros : {false, true}) {
            Groups from = groups_of(c, piece, position, half, zeros);
            float* to = zeros ? bench.zero : bench.scale;
#ifdef BF16_DOTS
            if (by_codes(c) && !in_code_tiles(c)) {
                turn_groups(from.data, from.step, groups, block, to + half * groups * LONG_BLOCK);
                continue;
            }
#endif
            const int row = groups_a_row(c, piece.heads);
            to += half * block * row;
            for (int p = 0; p < block; ++p, to += row, from.data += from.step) widen(from.data, groups, to);
            // Weights past the block's end are zero; what they are multiplied by must be a number.
            if (half && in_code_tiles(c)) std::fill_n(to, (CODE_BLOCK - block) * row, 0.0f);
        }
    }
}

enum class Half { keys, values, both };

// Adds what is read of a block of a piece; scales and zeros come with the keys.
template <class T>
inline void fetch(const Call& c, const Piece& piece, int64_t position, int block, Half which, Fetcher& next) {
    if (block <= 0) return;
    const int64_t of_groups = c.groups * piece.heads * 2, run = piece.heads * c.H * T::size;
    next.stretch(block);
    if (c.groups && which != Half::values)
        for (bool zeros : {false, true})
            for (int half : {0, 1}) {
                const Groups groups = groups_of(c, piece, position, half, zeros);
                next.add(groups.data, of_groups, groups.step);
            }
    if (which != Half::values) next.add(rows_of<T>(c, piece, position, 0), run, c.kv_bytes.position);
    if (which != Half::keys) next.add(rows_of<T>(c, piece, position, 1), run, c.kv_bytes.position);
}

// One piece into its partial sums. With its last block the first of the piece `after` it is fetched, if that has any;
// `fetched`: so was this one's.
template <class T>
inline void attend_piece(const Call& c, const Plan& plan, const Piece& piece, bool fetched, const Piece& after, Bench& bench,
                         const Partial& to) {
    const int queries = int(c.N / c.K);
    const bool dots = by_dots(c);
    // By measurement codes in tiles are read faster where all of a block is fetched as one run, others where values are
    // fetched with the keys before them, and the next keys with the values.
    const bool one_run = in_code_tiles(c);
#ifdef AMX
    const bool no_rows = by_codes(c) || (by_matrix<4>(c) && queries % 4 == 0);
#else
    const bool no_rows = by_codes(c);
#endif
    std::fill_n(to.acc, int64_t(piece.heads) * queries * c.H, 0.0f);
    std::fill_n(to.m, piece.heads * queries, LOWEST);
    std::fill_n(to.l, piece.heads * queries, 0.0f);
    for (int64_t position = piece.first; position < piece.stop; position += plan.block) {
        const int block = int(std::min<int64_t>(plan.block, piece.stop - position)), rows = piece.heads * block;
        if (no_rows)
            ;
        else if (position == piece.first || block < plan.block)
            find_rows<T>(c, piece, position, block, bench);
        else
            for (int i = 0; i < 2 * rows; ++i) bench.rows[i].data += plan.block * c.kv_bytes.position;
        if (c.groups) find_groups(c, piece, position, block, bench);
        const float* bias = c.bias ? c.bias + piece.sequence * c.bias_stride + position : nullptr;
        const char* keys = rows_of<T>(c, piece, position, 0);
        const bool last = position + block == piece.stop;
        const Piece& then = last ? after : piece;
        const int64_t follows = last ? after.first : position + block;
        const int block_next = int(std::min<int64_t>(then.stop - follows, plan.block));
        Fetcher next;
        if (!one_run || (position == piece.first && !fetched)) fetch<T>(c, piece, position, block, Half::values, next);
        fetch<T>(c, then, follows, block_next, one_run ? Half::both : Half::keys, next);
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            const int at = g0 * piece.heads;
#ifdef BF16_DOTS
            if constexpr (std::is_same_v<T, BF16>) {
#ifdef AMX
                if constexpr (GT >= 4)
                    if (by_matrix<GT>(c))
                        return attend_matrix<GT>(c, piece.heads, block, g0, keys, bias, bench.q, bench.score, bench.alpha,
                                                 to, next);
#endif
                if (dots) {
                    scores_dots<GT>(c, bench.rows.data(), rows, g0, bench.score, next);
                    weigh<GT>(piece.heads, block, bias, bench.score, to.m + at, to.l + at, bench.alpha, next, 0);
                    return values_dots<GT>(c, bench.rows.data() + rows, piece.heads, block, g0, bench.score, bench.alpha,
                                           to.acc, next);
                }
            }
            if constexpr (std::is_same_v<T, U8>) {
#ifdef AMX
                if constexpr (GT >= 4)
                    if (in_code_tiles(c))
                        return attend_code_tiles<GT>(c, piece.heads, block, g0, keys, bias, bench.q, bench.scale, bench.zero,
                                                     bench.score, bench.alpha, to, next);
#endif
                if (by_codes(c))
                    return attend_codes<GT>(c, piece.heads, block, g0, keys, bias, bench.q, bench.scale, bench.zero,
                                            bench.score, bench.alpha, to, next);
            }
#endif
            scores<T, GT>(c, bench.rows.data(), rows, g0, bench.score, next);
            weigh<GT>(piece.heads, block, bias, bench.score, to.m + at, to.l + at, bench.alpha, next, 0);
            values<T, GT>(c, bench.rows.data() + rows, piece.heads, block, g0, bench.score, bench.alpha, to.acc,
                          next);
        });
        next.rest();
    }
}

// Puts the partial sums of a sequence's heads together, in the first, and writes the output.
template <class Q>
inline void finish(Q type, const Call& c, const Piece& piece, const Partial* parts, int count, float* share) {
    const int queries = int(c.N / c.K);
    for (int h = 0; h < piece.heads; ++h) {
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            for (int g = 0; g < GT; ++g) {
                const int at = g0 * piece.heads + h * GT + g;
                const int64_t n = int64_t(h) * queries + g0;
                float top = parts[0].m[at], total = 0;
                for (int i = 1; i < count; ++i) top = std::max(top, parts[i].m[at]);
                for (int i = 0; i < count; ++i) {
                    share[i] = count > 1 ? std::exp2(parts[i].m[at] - top) : 1;
                    total += parts[i].l[at] * share[i];
                }
                for (int i = 0; i < count; ++i) share[i] *= total > 0 ? 1 / total : 0;
                char* out = c.out + (piece.sequence * c.N + int64_t(piece.head) * queries + n + g) * c.H * Q::size;
                const auto total_of = [&](int column) {
                    V sum = Simd::zero();
                    for (int i = 0; i < count; ++i) {
                        const V acc = Simd::load(parts[i].acc + n * c.H + (column * GT + g) * W);
                        sum = Simd::fma(Simd::set1(share[i]), acc, sum);
                    }
                    return sum;
                };
#ifdef BF16_DOTS
                if (by_dots(c)) {
                    for (int column = 0; column < c.H / W; column += 2) {
                        V low = total_of(column), high = total_of(column + 1);
#ifdef AMX
                        if (by_matrix<GT>(c))
                            pairs_in_order(low, high);
                        else
                            in_order(low, high);
#else
                        in_order(low, high);
#endif
                        Simd::put(type, out + column * W * Q::size, low);
                        Simd::put(type, out + (column + 1) * W * Q::size, high);
                    }
                    continue;
                }
                if (by_codes(c)) {
                    for (int column = 0; column < c.H / W; column += 4) {
                        V x[4];
                        for (int i = 0; i < 4; ++i) x[i] = total_of(column + i);
                        in_order(x[0], x[1], x[2], x[3]);
                        for (int i = 0; i < 4; ++i) Simd::put(type, out + (column + i) * W * Q::size, x[i]);
                    }
                    continue;
                }
#endif
                for (int column = 0; column < c.H / W; ++column)
                    Simd::put(type, out + column * W * Q::size, total_of(column));
            }
        });
    }
}

template <class T>
void serve(const Call& c, const Plan& plan, Shared& shared) {
    static thread_local Bench bench;
    static thread_local std::vector<Partial> parts;
    static thread_local std::vector<float> shares;
    bench.size(c, plan);
    Taken next;
    for (Taken now = shared.take(plan); now.count > 0; now = next.count ? next : shared.take(plan)) {
        const bool fetched = next.count > 0;
        next = shared.take(plan, true);
        const Piece piece = plan.piece(c, now), after = plan.piece(c, next);
        const int64_t unit = now.task / plan.chunks;
        shared.taken[now.task] = int(now.count);
        if (piece.stop == c.length) append(c, piece);  // No other piece reads it.
#ifdef BF16_DOTS
        if (by_dots(c))
            pack_dots(c, piece, bench.q);
        else if (by_codes(c))
            by_query_type(c, [&](auto type) { pack_codes(type, c, piece, bench.q); });
        else
#endif
            by_query_type(c, [&](auto type) { pack_queries(type, c, piece, bench.q); });
#ifdef AMX
        turn_queries(c, piece.heads, bench.q);
#endif
        // A whole unit's sums stay near the core.
        const bool whole = now.count == plan.chunks;
        const Partial sums = whole ? Partial::at(bench.sums, c, plan) : shared.partial(c, plan, now.task);
        attend_piece<T>(c, plan, piece, fetched, after, bench, sums);
        parts.clear();
        if (whole)
            parts.push_back(sums);
        else if (shared.left[unit].fetch_sub(int(now.count)) == now.count)
            for (int64_t i = unit * plan.chunks; i < (unit + 1) * plan.chunks; i += shared.taken[i])
                parts.push_back(shared.partial(c, plan, i));
        else
            continue;
        shares.resize(parts.size());
        by_query_type(c, [&](auto type) { finish(type, c, piece, parts.data(), int(parts.size()), shares.data()); });
    }
#ifdef AMX
    leave_tiles();
#endif
}

// Nearly all that there is to compile: each part of the kernel has one of these.
using Served = std::tuple_element_t<FLEX_PART, std::tuple<F32, F16, BF16, U8>>;
template void serve<Served>(const Call&, const Plan&, Shared&);

#if FLEX_PART == 0
extern template void serve<F16>(const Call&, const Plan&, Shared&);
extern template void serve<BF16>(const Call&, const Plan&, Shared&);
extern template void serve<U8>(const Call&, const Plan&, Shared&);

inline void attend(const Call& c, const Plan& plan, Shared& shared) {
    by_type(c.kv_type, [&](auto kv) { serve<decltype(kv)>(c, plan, shared); });
}
#endif

// Reads memory, and adds up what it reads.
inline float read_all(const char* from, int64_t bytes) {
    V sum[8];
    for (V& each : sum) each = Simd::zero();
    for (int64_t i = 0; i + 8 * W * 4 <= bytes; i += 8 * W * 4)
        for (int j = 0; j < 8; ++j)
            sum[j] = Simd::fma(Simd::load((const float*)(from + i) + j * W), Simd::set1(1.0f), sum[j]);
    float total = 0;
    for (V& each : sum)
        for (int j = 0; j < W; ++j) total += each[j];
    return total;
}
