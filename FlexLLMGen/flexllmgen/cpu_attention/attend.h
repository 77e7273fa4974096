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
    for (; W >= 8 && queries - g >= 8; g += 8) f(std::integral_constant<int, 8>{}, g);
    for (; queries - g >= 4; g += 4) f(std::integral_constant<int, 4>{}, g);
    if (queries - g >= 2) f(std::integral_constant<int, 2>{}, g), g += 2;
    if (queries - g >= 1) f(std::integral_constant<int, 1>{}, g);
}

// Where a row begins, its groups' scales and zeros (of codes), and its head's queries (of keys).
struct Row {
    const char* data;
    const float *scale, *zero, *q;
};

template <class T>
inline V value(T type, const Row& row, int column, V scale, V zero) {
    const V x = Simd::get(type, row.data + int64_t(column) * W * T::size);
    if constexpr (std::is_same_v<T, U8>) return Simd::fma(x, scale, zero);
    return x;
}

template <class T>
inline V of_group(const float* values, int group) {
    if constexpr (std::is_same_v<T, U8>) return Simd::set1(values[group]);
    return Simd::zero();
}

inline void fetch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Fetches what is read next while something else is computed, in the order in which it lies: that is what the
// processor's own prefetching follows. `runs` runs of `run` bytes, `step` apart.
struct Fetcher {
    const char *start, *at, *end;
    int64_t run, step;
    int runs;

    Fetcher(const char* from, int64_t run, int64_t step, int runs) : start(from), run(run), step(step), runs(runs) {
        begin();
    }
    void begin() {
        at = (const char*)(uintptr_t(start) / 64 * 64);
        end = start + run;
    }
    void lines(int count) {
        if (runs <= 0) return;
        for (int i = 0; i < count; ++i) {
            __builtin_prefetch(at, 0, 2);  // Into the second cache: the first would be too small.
            if ((at += 64) < end) continue;
            if (--runs <= 0) return;
            start += step;
            begin();
        }
    }
};

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

// Scores of `rows` rows, [row][GT], of the queries from `g0` on.
template <class T, int GT>
inline void scores(const Call& c, const Row* row, int rows, int g0, float* out, Fetcher& next) {
    constexpr int R = NR / GT, AT_ONCE = R < 2 ? R : 2;
    const int columns = int(c.H / W), width = c.groups ? int(c.group_size / W) : columns;
    const int64_t first = int64_t(g0) * c.H;
    const int lines = int(c.H * T::size + 63) / 64;
    for (int i = 0; i < rows; i += R) {
        V sum[NR];
#pragma GCC unroll 16
        for (int r = 0; r < R; r += AT_ONCE) {
            const Row* k[AT_ONCE];
            const float* q[AT_ONCE];
            V s[AT_ONCE * GT];
            for (int a = 0; a < AT_ONCE; ++a) {
                k[a] = row + std::min(i + r + a, rows - 1);
                q[a] = k[a]->q + first;
            }
            for (V& each : s) each = Simd::zero();
            for (int group = 0, column = 0; column < columns; ++group) {
                V scale[AT_ONCE], zero[AT_ONCE];
                for (int a = 0; a < AT_ONCE; ++a) {
                    scale[a] = of_group<T>(k[a]->scale, group);
                    zero[a] = of_group<T>(k[a]->zero, group);
                }
                const int end = std::min(column + width, columns);
                const auto add = [&](auto same) {
                    for (; column < end; ++column) {
                        V x[AT_ONCE];
                        for (int a = 0; a < AT_ONCE; ++a) x[a] = value(T{}, *k[a], column, scale[a], zero[a]);
                        for (int g = 0; g < GT; ++g) {
                            const int64_t at = (column * GT + g) * W;
                            const V first_q = Simd::load(q[0] + at);
                            for (int a = 0; a < AT_ONCE; ++a) {
                                const V each = decltype(same)::value ? first_q : Simd::load(q[a] + at);
                                s[a * GT + g] = Simd::fma(x[a], each, s[a * GT + g]);
                            }
                        }
                    }
                };
                // Keys of one head, as nearly all neighbours are, share what is loaded of its queries.
                if (q[0] == q[AT_ONCE - 1])
                    add(std::true_type{});
                else
                    add(std::false_type{});
            }
            for (int a = 0; a < AT_ONCE * GT; ++a) sum[r * GT + a] = s[a];
            next.lines(AT_ONCE * lines);
            // Of keys soon to be read, from the second cache into the first.
            for (int a = 0; a < AT_ONCE && g0 == 0; ++a) {
                const char* soon = row[std::min(i + r + a + 4, rows - 1)].data;
                for (int line = 0; line < lines; ++line) __builtin_prefetch(soon + 64 * line, 0, 3);
            }
        }
        Simd::sums(sum, out + i * GT);
    }
}

// Turns scores into weights; moves the largest score `m`, leaves what all sums so far are multiplied by in `alpha`.
template <int GT>
inline void weigh(int heads, int block, const float* bias, float* score, float* m, float* l, float* alpha) {
    const int count = block * GT;
    for (int h = 0; h < heads; ++h, score += count, m += GT, l += GT, alpha += GT) {
        if (bias)
            for (int p = 0; p < block; ++p)
                for (int g = 0; g < GT; ++g) score[p * GT + g] += bias[p] * LOG2E;
        // Lanes of a vector are queries, and then the next position's; what is past the end repeats the first.
        float lane[W];
        V top = Simd::set1(LOWEST), sum = Simd::zero();
        const int whole = count / W * W;
        for (int i = 0; i < whole; i += W) top = Simd::larger(Simd::load(score + i), top);
        Simd::store(lane, top);
        for (int i = whole; i < count; ++i) lane[i - whole] = std::max(lane[i - whole], score[i]);
        for (int step = W; (step /= 2) >= GT;)
            for (int i = 0; i < step; ++i) lane[i] = std::max(lane[i], lane[i + step]);
        for (int g = 0; g < GT; ++g) {
            lane[g] = std::max(lane[g], m[g]);
            alpha[g] = m[g] - lane[g];
            m[g] = lane[g];
        }
        for (int i = GT; i < W; ++i) lane[i] = lane[i - GT];
        const V minus = Simd::mul(Simd::load(lane), Simd::set1(-1.0f)), one = Simd::set1(1.0f);
        for (int i = 0; i < whole; i += W) {
            const V weight = exp2(Simd::fma(Simd::load(score + i), one, minus));
            Simd::store(score + i, weight);
            sum = Simd::fma(weight, one, sum);
        }
        Simd::store(lane, sum);
        if (whole < count) {
            float rest[W];
            for (int i = 0; i < W; ++i) rest[i] = whole + i < count ? score[whole + i] - m[i % GT] : LOWEST;
            Simd::store(rest, exp2(Simd::load(rest)));
            for (int i = 0; i < W; ++i) lane[i] += rest[i];
            for (int i = whole; i < count; ++i) score[i] = rest[i - whole];
        }
        for (int step = W; (step /= 2) >= GT;)
            for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
        for (int g = 0; g < GT; ++g) l[g] = l[g] * (alpha[g] = alpha[g] < -126.0f ? 0.0f : std::exp2(alpha[g])) + lane[g];
    }
}

// Adds weighted values of one head, CT vectors of it from `column` on; `lines` lines are fetched with each.
template <class T, int GT, int CT>
inline void add_values(const Row* row, int block, const float* weight, const float* alpha, float* acc, int column,
                       int group, int lines, Fetcher& next) {
    V sum[GT * CT];
    for (int i = 0; i < CT; ++i)
        for (int g = 0; g < GT; ++g)
            sum[i * GT + g] = Simd::mul(Simd::load(acc + ((column + i) * GT + g) * W), Simd::set1(alpha[g]));
    for (int p = 0; p < block; ++p) {
        V x[CT];
        const V scale = of_group<T>(row[p].scale, group), zero = of_group<T>(row[p].zero, group);
        for (int i = 0; i < CT; ++i) x[i] = value(T{}, row[p], column + i, scale, zero);
        for (int g = 0; g < GT; ++g) {
            const V w = Simd::set1(weight[p * GT + g]);
            for (int i = 0; i < CT; ++i) sum[i * GT + g] = Simd::fma(x[i], w, sum[i * GT + g]);
        }
        next.lines(lines);
    }
    for (int i = 0; i < CT; ++i)
        for (int g = 0; g < GT; ++g) Simd::store(acc + ((column + i) * GT + g) * W, sum[i * GT + g]);
}

template <class T, int GT>
inline void values(const Call& c, const Row* row, int heads, int block, int g0, const float* weight,
                   const float* alpha, float* acc, Fetcher& next) {
    // Of codes, vectors of one group at a time.
    constexpr int MOST = std::is_same_v<T, U8> ? MIN_GROUP / W : 8, CT = std::min(NR / GT, MOST);
    const int columns = int(c.H / W), queries = int(c.N / c.K);
    acc += int64_t(g0) * c.H;
    for (int h = 0; h < heads; ++h, row += block, weight += block * GT, alpha += GT, acc += queries * c.H) {
        int column = 0;
        const auto take = [&](auto count) {
            constexpr int N = decltype(count)::value;
            if constexpr (N <= CT) {
                for (; columns - column >= N; column += N) {
                    const int64_t offset = int64_t(column) * W * T::size;
                    const int group = c.groups ? int(column * W / c.group_size) : 0;
                    const int lines = int((offset + N * W * T::size + 63) / 64 - (offset + 63) / 64);
                    add_values<T, GT, N>(row, block, weight, alpha, acc, column, group, lines, next);
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

// Rows of a block's positions: keys [head][block], then values.
template <class T>
inline void find_rows(const Call& c, const Piece& piece, int64_t position, int block, Bench& bench) {
    const int rows = piece.heads * block, groups = int(c.groups) * piece.heads;
    const int64_t queries = c.N / c.K;
    for (int half = 0; half < 2; ++half) {
        for (int p = 0; p < block; ++p) {
            const int64_t skip = (half * block + p) * groups;
            const char* data = c.kv + (position + p) * c.position_bytes + half * c.half_bytes +
                               piece.sequence * c.sequence_bytes + piece.head * c.H * T::size;
            for (int h = 0; h < piece.heads; ++h)
                bench.rows[half * rows + h * block + p] =
                    Row{data + h * c.H * T::size, bench.scale + skip + h * c.groups, bench.zero + skip + h * c.groups,
                        bench.q + h * queries * c.H};
        }
    }
}

// Scales and zeros of a block's codes as fp32; those of the next are fetched.
inline void find_groups(const Call& c, const Piece& piece, int64_t position, int block, Bench& bench) {
    const int groups = int(c.groups) * piece.heads;
    const int64_t skip = piece.head * c.groups * 2;
    for (int half = 0; half < 2; ++half) {
        for (int p = 0; p < block; ++p) {
            const int64_t at = (half * block + p) * groups;
            const char* s = c.scale + (position + p) * c.scale_position_bytes + half * c.scale_half_bytes +
                            piece.sequence * c.scale_sequence_bytes + skip;
            const char* z = c.zero + (position + p) * c.zero_position_bytes + half * c.zero_half_bytes +
                            piece.sequence * c.zero_sequence_bytes + skip;
            widen(s, groups, bench.scale + at);
            widen(z, groups, bench.zero + at);
            fetch(s + block * c.scale_position_bytes, groups * 2);
            fetch(z + block * c.zero_position_bytes, groups * 2);
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
        if (position == piece.first || block < plan.block)
            find_rows<T>(c, piece, position, block, bench);
        else
            for (int i = 0; i < 2 * rows; ++i) bench.rows[i].data += plan.block * c.position_bytes;
        if (c.groups) find_groups(c, piece, position, block, bench);
        const float* bias = c.bias ? c.bias + piece.sequence * c.bias_stride + position : nullptr;
        const char* keys = bench.rows[0].data;
        const int64_t run = piece.heads * c.H * T::size, left = piece.stop - position - block;
        Fetcher values_now(keys + c.half_bytes, run, c.position_bytes, block);
        Fetcher keys_next(keys + block * c.position_bytes, run, c.position_bytes, int(std::min<int64_t>(left, plan.block)));
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            const int at = g0 * piece.heads;
            scores<T, GT>(c, bench.rows.data(), rows, g0, bench.score, values_now);
            weigh<GT>(piece.heads, block, bias, bench.score, to.m + at, to.l + at, bench.alpha);
            values<T, GT>(c, bench.rows.data() + rows, piece.heads, block, g0, bench.score, bench.alpha, to.acc, keys_next);
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
