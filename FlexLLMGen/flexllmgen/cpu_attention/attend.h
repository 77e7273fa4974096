// The computation, once for each instruction set: included inside a namespace that has a Simd of its own.
//
// A piece is some key heads of one sequence over some positions. Its rows are read once, in the order in which
// they lie: a few positions at a time, first the keys of all its heads, then the values, and while one is read
// the other is fetched. Softmax runs along (the largest score and the sum so far are kept, Milakov and
// Gimelshein 2018); what pieces of a sequence found is put together by their largest scores.
//
// Queries and sums lie packed for the tiles: [head][up to 8 queries together][vector of the head][query][W].

using V = Simd::V;
constexpr int W = Simd::W, NR = Simd::NR;

// 2 to the power of x <= 0, nothing under 2^-126: the series to the sixth power, off by 1e-7 at most.
inline V exp2(V x) {
    const V least = Simd::set1(-126.0f), bounded = Simd::larger(x, least), n = Simd::nearest(bounded);
    const V f = Simd::fma(n, Simd::set1(-1.0f), bounded);
    V y = Simd::set1(1.5403530e-4f);
    for (float each : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        y = Simd::fma(y, f, Simd::set1(each));
    return Simd::where_ge(x, least, Simd::times_power(y, n));
}

// Calls f(how many, from which) for the queries of a key head: eight at a time, then four, two, one.
template <class F>
inline void in_groups(int queries, F&& f) {
    int g = 0;
    for (; NR >= 8 && queries - g >= 8; g += 8) f(std::integral_constant<int, 8>{}, g);
    if (queries - g >= 4) f(std::integral_constant<int, 4>{}, g), g += 4;
    if (queries - g >= 2) f(std::integral_constant<int, 2>{}, g), g += 2;
    if (queries - g >= 1) f(std::integral_constant<int, 1>{}, g);
}

// Where a row's values begin, and its groups' scales and zeros (of codes).
struct Row {
    const char* data;
    const float* scale;
    const float* zero;
};

template <class T>
inline V value(T type, const Row& row, int column, int group) {
    V x = Simd::get(type, row.data + int64_t(column) * W * T::size);
    if constexpr (std::is_same_v<T, U8>) x = Simd::fma(x, Simd::set1(row.scale[group]), Simd::set1(row.zero[group]));
    return x;
}

inline void fetch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
}

// What a thread works with.
struct Bench {
    std::vector<float> memory;
    float *q, *score, *alpha, *scale, *zero;
    std::vector<Row> rows;

    void size(const Call& c, const Plan& plan) {
        const size_t queries = size_t(plan.heads) * (c.N / c.K), rows_now = size_t(plan.heads) * plan.block;
        const size_t scores = queries * plan.block + 2 * 8 * NR, groups = 2 * rows_now * c.groups + NR;
        memory.resize(queries * c.H + scores + queries + 2 * NR + 2 * groups + 16);
        float* at = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        q = at, at += queries * c.H;
        score = at, at += scores;
        alpha = at, at += queries + 2 * NR;
        scale = at, at += groups;
        zero = at;
        rows.resize(2 * rows_now);
    }
};

// Scores of `rows` rows, [row][GT]; rows of a head follow each other, `block` of them.
template <class T, int GT>
inline void scores(const Call& c, const Row* row, int rows, int block, const float* q, int64_t head_q, float* out) {
    constexpr int R = NR / GT, AT_ONCE = R < 2 ? R : 2;
    const int columns = int(c.H / W), groups = c.groups ? int(c.groups) : 1, width = columns / groups;
    const int64_t bytes = c.H * T::size;
    for (int i = 0; i < rows; i += R) {
        V sum[NR];
        for (int r = 0; r < R; r += AT_ONCE) {
            const Row* k[AT_ONCE];
            const float* qs[AT_ONCE];
            V* s = sum + r * GT;
            for (int a = 0; a < AT_ONCE; ++a) {
                const int j = std::min(i + r + a, rows - 1);
                k[a] = row + j;
                qs[a] = q + j / block * head_q;
                for (int g = 0; g < GT; ++g) s[a * GT + g] = Simd::zero();
            }
            for (int group = 0, column = 0; group < groups; ++group) {
                for (int end = column + width; column < end; ++column) {
                    for (int a = 0; a < AT_ONCE; ++a) {
                        const V x = value(T{}, *k[a], column, group);
                        for (int g = 0; g < GT; ++g)
                            s[a * GT + g] = Simd::fma(x, Simd::load(qs[a] + (column * GT + g) * W), s[a * GT + g]);
                    }
                }
            }
            for (int a = 0; a < AT_ONCE; ++a) fetch(k[a]->data + c.half_bytes, bytes);  // The values of this key.
        }
        Simd::sums(sum, out + i * GT);
    }
}

// Turns scores into weights; moves the largest score `m`, leaves what all sums so far are multiplied by in `alpha`.
template <int GT>
inline void weigh(int heads, int block, const float* bias, float* score, float* m, float* l, float* alpha) {
    for (int h = 0; h < heads; ++h) {
        float* s = score + h * block * GT;
        float top[GT];
        for (int g = 0; g < GT; ++g) top[g] = m[h * GT + g];
        for (int p = 0; p < block; ++p) {
            const float add = bias ? bias[p] * LOG2E : 0.0f;
            for (int g = 0; g < GT; ++g) {
                const float x = s[p * GT + g] + add;
                s[p * GT + g] = x;
                top[g] = x > top[g] ? x : top[g];
            }
        }
        for (int p = 0; p < block; ++p)
            for (int g = 0; g < GT; ++g) s[p * GT + g] -= top[g];
        for (int g = 0; g < GT; ++g) {
            alpha[h * GT + g] = m[h * GT + g] - top[g];
            m[h * GT + g] = top[g];
        }
    }
    for (int i = 0; i < heads * block * GT; i += W) Simd::store(score + i, exp2(Simd::load(score + i)));
    for (int i = 0; i < heads * GT; i += W) Simd::store(alpha + i, exp2(Simd::load(alpha + i)));
    for (int h = 0; h < heads; ++h) {
        const float* s = score + h * block * GT;
        float sum[GT] = {};
        for (int p = 0; p < block; ++p)
            for (int g = 0; g < GT; ++g) sum[g] += s[p * GT + g];
        for (int g = 0; g < GT; ++g) l[h * GT + g] = l[h * GT + g] * alpha[h * GT + g] + sum[g];
    }
}

// Adds weighted values of one head, CT vectors of it from `column` on; `ahead` is where the next keys lie.
template <class T, int GT, int CT>
inline void add_values(const Call& c, const Row* row, int block, const float* weight, const float* alpha, float* acc,
                       int column, int64_t ahead, int64_t ahead_bytes) {
    V sum[GT * CT];
    const int per_group = c.groups ? int(c.H / W / c.groups) : 1 << 20;
    for (int i = 0; i < CT; ++i)
        for (int g = 0; g < GT; ++g)
            sum[i * GT + g] = Simd::mul(Simd::load(acc + ((column + i) * GT + g) * W), Simd::set1(alpha[g]));
    for (int p = 0; p < block; ++p) {
        V x[CT];
        for (int i = 0; i < CT; ++i) x[i] = value(T{}, row[p], column + i, (column + i) / per_group);
        for (int g = 0; g < GT; ++g) {
            const V w = Simd::set1(weight[p * GT + g]);
            for (int i = 0; i < CT; ++i) sum[i * GT + g] = Simd::fma(x[i], w, sum[i * GT + g]);
        }
        fetch(row[p].data + ahead, ahead_bytes);
    }
    for (int i = 0; i < CT; ++i)
        for (int g = 0; g < GT; ++g) Simd::store(acc + ((column + i) * GT + g) * W, sum[i * GT + g]);
}

template <class T, int GT>
inline void values(const Call& c, const Row* row, int heads, int block, const float* weight, const float* alpha,
                   float* acc, int64_t head_q, int64_t ahead) {
    constexpr int CT = NR / GT < 8 ? NR / GT : 8;
    const int columns = int(c.H / W);
    for (int h = 0; h < heads; ++h, row += block, weight += block * GT, alpha += GT, acc += head_q) {
        // Each part of the row has the same part of the next block's key fetched.
        const auto fetched = [&](int column, int count) {
            const int64_t first = int64_t(column) * W * T::size / 64 * 64, stop = int64_t(column + count) * W * T::size;
            return std::pair<int64_t, int64_t>(ahead + first, ahead ? stop / 64 * 64 - first : 0);
        };
        int column = 0;
        const auto take = [&](auto count) {
            constexpr int N = decltype(count)::value;
            if constexpr (N <= CT) {
                for (; columns - column >= N; column += N) {
                    const auto [where, bytes] = fetched(column, N);
                    add_values<T, GT, N>(c, row, block, weight, alpha, acc, column, where, bytes);
                }
            }
        };
        take(std::integral_constant<int, 8>{});
        take(std::integral_constant<int, 4>{});
        take(std::integral_constant<int, 2>{});
        take(std::integral_constant<int, 1>{});
    }
}

template <class Q>
inline void pack_queries(Q type, const Call& c, const Piece& piece, float* q) {
    const int queries = int(c.N / c.K);
    const V factor = Simd::set1(c.factor * LOG2E);
    for (int h = 0; h < piece.heads; ++h) {
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            const int64_t first = int64_t(h) * queries + g0;
            for (int g = 0; g < GT; ++g) {
                const char* from =
                    c.q + ((piece.sequence * c.N + int64_t(piece.head) * queries) + first + g) * c.H * Q::size;
                for (int column = 0; column < c.H / W; ++column)
                    Simd::store(q + first * c.H + (column * GT + g) * W,
                                Simd::mul(factor, Simd::get(type, from + column * W * Q::size)));
            }
        });
    }
}

inline void widen(const char* from, int count, float* to) {
    int i = 0;
    for (; i + W <= count; i += W) Simd::store(to + i, Simd::get(F16{}, from + 2 * i));
    for (; i < count; ++i) to[i] = from_half(((const uint16_t*)from)[i]);
}

// Rows of the positions from `position` on: keys [head][block], then values.
template <class T>
inline void find_rows(const Call& c, const Piece& piece, int64_t position, int block, Bench& bench) {
    const int rows = piece.heads * block, groups = int(c.groups) * piece.heads;
    for (int half = 0; half < 2; ++half) {
        for (int p = 0; p < block; ++p) {
            const float *scale = bench.scale + (half * block + p) * groups, *zero = bench.zero + (scale - bench.scale);
            if constexpr (std::is_same_v<T, U8>) {
                const int64_t skip = int64_t(piece.head) * c.groups * 2;
                const char* s = c.scale + (position + p) * c.scale_position_bytes + half * c.scale_half_bytes +
                                piece.sequence * c.scale_sequence_bytes + skip;
                const char* z = c.zero + (position + p) * c.zero_position_bytes + half * c.zero_half_bytes +
                                piece.sequence * c.zero_sequence_bytes + skip;
                widen(s, groups, const_cast<float*>(scale));
                widen(z, groups, const_cast<float*>(zero));
                fetch(s + block * c.scale_position_bytes, groups * 2);
                fetch(z + block * c.zero_position_bytes, groups * 2);
            }
            const char* data = c.kv + (position + p) * c.position_bytes + half * c.half_bytes +
                               piece.sequence * c.sequence_bytes + piece.head * c.H * T::size;
            for (int h = 0; h < piece.heads; ++h)
                bench.rows[half * rows + h * block + p] =
                    Row{data + h * c.H * T::size, scale + h * c.groups, zero + h * c.groups};
        }
    }
}

// One piece into its partial sums.
template <class T>
inline void attend_piece(const Call& c, const Plan& plan, const Piece& piece, Bench& bench, const Partial& to) {
    const int queries = int(c.N / c.K);
    std::fill_n(to.acc, int64_t(piece.heads) * queries * c.H, 0.0f);
    std::fill_n(to.m, piece.heads * queries, LOWEST);
    std::fill_n(to.l, piece.heads * queries, 0.0f);
    for (int64_t position = piece.first; position < piece.stop; position += plan.block) {
        const int block = int(std::min<int64_t>(plan.block, piece.stop - position)), rows = piece.heads * block;
        find_rows<T>(c, piece, position, block, bench);
        const float* bias = c.bias ? c.bias + piece.sequence * c.bias_stride + position : nullptr;
        float* score = bench.score;
        const bool last = position + block >= piece.stop;
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            scores<T, GT>(c, bench.rows.data(), rows, block, bench.q + g0 * c.H, queries * c.H, score);
            weigh<GT>(piece.heads, block, bias, score, to.m + g0 * piece.heads, to.l + g0 * piece.heads, bench.alpha);
            values<T, GT>(c, bench.rows.data() + rows, piece.heads, block, score, bench.alpha, to.acc + g0 * c.H,
                          queries * c.H, last ? 0 : block * c.position_bytes - c.half_bytes);
        });
    }
}

// Puts the partial sums of a sequence's heads together, in the first, and writes the output.
template <class Q>
inline void finish(Q type, const Call& c, const Piece& piece, const Partial* parts, int count) {
    const int queries = int(c.N / c.K);
    for (int h = 0; h < piece.heads; ++h) {
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            for (int g = 0; g < GT; ++g) {
                const int at = g0 * piece.heads + h * GT + g;
                const int64_t n = int64_t(h) * queries + g0;
                float top = parts[0].m[at], total = 0;
                for (int i = 1; i < count; ++i) top = std::max(top, parts[i].m[at]);
                for (int i = 0; i < count; ++i) total += parts[i].l[at] * std::exp2(parts[i].m[at] - top);
                const float each = total > 0 ? 1 / total : 0;
                char* out = c.out + (piece.sequence * c.N + int64_t(piece.head) * queries + n + g) * c.H * Q::size;
                for (int column = 0; column < c.H / W; ++column) {
                    V sum = Simd::zero();
                    for (int i = 0; i < count; ++i) {
                        const float share = std::exp2(parts[i].m[at] - top) * each;
                        const V acc = Simd::load(parts[i].acc + n * c.H + (column * GT + g) * W);
                        sum = Simd::fma(Simd::set1(share), acc, sum);
                    }
                    Simd::put(type, out + column * W * Q::size, sum);
                }
            }
        });
    }
}

template <class Q, class T>
inline void serve(const Call& c, const Plan& plan, Shared& shared) {
    static thread_local Bench bench;
    bench.size(c, plan);
    for (int64_t task; (task = shared.next.fetch_add(1)) < plan.tasks();) {
        const Piece piece = plan.piece(c, task);
        const int64_t unit = task / plan.chunks;
        pack_queries(Q{}, c, piece, bench.q);
        attend_piece<T>(c, plan, piece, bench, shared.partial(c, plan, task));
        if (shared.left[unit].fetch_sub(1) != 1) continue;
        std::vector<Partial> parts;
        for (int64_t i = 0; i < plan.chunks; ++i) parts.push_back(shared.partial(c, plan, unit * plan.chunks + i));
        finish(Q{}, c, piece, parts.data(), int(plan.chunks));
    }
}

inline void attend(const Call& c, const Plan& plan, Shared& shared) {
    by_type(c.q_type, [&](auto q) {
        by_type(c.kv_type, [&](auto kv) {
            if constexpr (!std::is_same_v<decltype(q), U8>) serve<decltype(q), decltype(kv)>(c, plan, shared);
        });
    });
}

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
