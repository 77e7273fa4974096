// The tiles: scores, weights and weighted sums of a block of rows; included inside a namespace, after its Simd.
//
// Queries and sums lie packed: [head][up to 8 queries together][vector of the head][query][W].

using V = Simd::V;
constexpr int W = Simd::W, NR = Simd::NR;
// Powers of two that a weight may come to before all sums so far are scaled down.
constexpr float SLACK = 8;

// 2 to the power of x <= SLACK, nothing under LEAST_POWER; of 0 exactly 1. The polynomial is off by 1e-7 at most over
// [0, 1), of those of the fifth degree that are 1 at 0 the least.
inline V exp2(V x) {
    const V f = Simd::fraction(x);
    V y = Simd::set1(1.8671302e-3f);
    for (float each : {9.0170298e-3f, 5.5799913e-2f, 2.4016444e-1f, 6.9315130e-1f, 1.0f})
        y = Simd::fma(y, f, Simd::set1(each));
    return Simd::times_power(y, x);
}

// f over the lanes of each query, in all of them: lanes are GT queries, and the same again.
template <int GT, class F>
inline V fold(V x, F&& f) {
    if constexpr (GT < W)
        return fold<2 * GT>(f(x, Simd::turned<GT>(x)), f);
    else
        return x;
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

// Floats of a key head's packed queries: of codes they are followed by each one's sums over each group, lane by lane.
inline int64_t packed_floats(const Call& c) { return c.N / c.K * (c.H + c.groups * W); }

// One query of a row of codes: scale and zero then take part once for each group and not for each code.
template <class T, int GT>
constexpr bool ONCE_A_GROUP = std::is_same_v<T, U8> && GT == 1;

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

// Rows of one head, `step` bytes apart.
struct Rows {
    const char* data;
    int64_t step;

    // `count` of them, in `memory` followed by rows of zeros if they are less than a `whole` block.
    Rows(const char* data, int64_t step, int count, int whole, int64_t bytes, char* memory) : data(data), step(step) {
        if (count == whole) return;
        for (int p = 0; p < count; ++p) std::memcpy(memory + p * bytes, data + p * step, size_t(bytes));
        std::memset(memory + count * bytes, 0, size_t((whole - count) * bytes));
        this->data = memory, this->step = bytes;
    }
};

// Fetches what is read next while something else is computed, in the order in which it lies: that is what the processor's own
// prefetching follows. Lines are spread over all that is computed, by the time that it takes: a core waits while many are
// under way, and with none under way memory is idle.
class Fetcher {
   public:
    // Begins a stretch of so many rows, after those before it.
    void stretch(int rows) { stretches_[count_++].rows = rows; }
    // Of each of its rows `run` bytes, `step` apart; parts come in the order of their addresses.
    void add(const char* from, int64_t run, int64_t step) {
        Stretch& last = stretches_[count_ - 1];
        Part* before = last.count ? last.parts + last.count - 1 : nullptr;
        if (before && step == before->step && from == before->from + before->run)
            before->run += run;
        else
            last.parts[last.count++] = Part{from, run, step};
    }
    void lines(int count) {
        for (; count > 0; --count, at_ += 64) {
            if (at_ >= end_ && !next_part()) return;
            __builtin_prefetch(at_, 0, 2);  // Into the second cache: the first would be too small.
        }
    }
    void rest() {
        do lines(64);
        while (at_ < end_ || now_ < count_);
    }

   private:
    struct Part {
        const char* from;
        int64_t run, step;
    };
    struct Stretch {
        Part parts[6];
        int rows, count = 0, part = 0;
    };
    bool next_part() {
        while (now_ < count_ && stretches_[now_].rows <= 0) ++now_;
        if (now_ == count_) return false;
        Stretch& it = stretches_[now_];
        Part& part = it.parts[it.part];
        // Rows that follow one another are fetched as one.
        const bool together = it.count == 1 && part.run == part.step;
        at_ = (const char*)(uintptr_t(part.from) / 64 * 64);
        end_ = part.from + part.run * (together ? it.rows : 1);
        part.from += part.step;
        it.part = (it.part + 1) % it.count;
        if (it.part == 0) it.rows = together ? 0 : it.rows - 1;
        return true;
    }
    Stretch stretches_[2];
    int count_ = 0, now_ = 0;
    const char *at_ = nullptr, *end_ = nullptr;
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
                if constexpr (ONCE_A_GROUP<T, GT>) {
                    V part[AT_ONCE];
                    for (V& each : part) each = Simd::zero();
                    const auto one = [&](int column) {
                        for (int a = 0; a < AT_ONCE; ++a)
                            part[a] = Simd::fma(Simd::get(T{}, k[a]->data + int64_t(column) * W),
                                                Simd::load(q[a] + column * W), part[a]);
                    };
                    for (; column + 4 <= end; column += 4)
#pragma GCC unroll 4
                        for (int i = 0; i < 4; ++i) one(column + i);
                    for (; column < end; ++column) one(column);
                    for (int a = 0; a < AT_ONCE; ++a) {
                        const float* of_queries = k[a]->q + c.N / c.K * c.H + (g0 * c.groups + group) * W;
                        s[a] = Simd::fma(part[a], scale[a], Simd::fma(Simd::load(of_queries), zero[a], s[a]));
                    }
                    continue;
                }
                const auto add = [&](auto same) {
                    for (; column < end; ++column) {
                        V x[AT_ONCE];
                        for (int a = 0; a < AT_ONCE; ++a) x[a] = value(T{}, *k[a], column, scale[a], zero[a]);
                        for (int g = 0; g < GT; ++g) {
                            const int64_t at = (column * GT + g) * W;
                            V first_q = Simd::load(q[0] + at);
                            if (decltype(same)::value) Simd::keep(first_q);
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

// Turns scores into weights: `m` is the score that has the weight 1, and moves where one is larger by SLACK. Leaves what
// all sums so far are multiplied by in `alpha`. With each vector `lines` lines are fetched.
template <int GT>
inline void weigh(int heads, int block, const float* bias, float* score, float* m, float* l, float* alpha, Fetcher& next,
                  int lines) {
    const int count = block * GT, whole = count / W * W;
    for (int h = 0; h < heads; ++h, score += count, m += GT, l += GT, alpha += GT) {
        if (bias)
            for (int p = 0; p < block; ++p)
                for (int g = 0; g < GT; ++g) score[p * GT + g] += bias[p] * LOG2E;
        // Lanes of a vector are queries, and then the next position's; the last one may not be full.
        float last[W];
        std::fill_n(last, W, LOWEST);
        std::copy(score + whole, score + count, last);
        V top = Simd::load(last), sum = Simd::zero(), tops[4], sums[4];
        for (int i = 0; i < 4; ++i) tops[i] = top, sums[i] = sum;
        // Four at a time, so that none waits for the one before it.
        const int fours = whole / (4 * W) * (4 * W);
        for (int i = 0; i < fours; i += 4 * W)
            for (int j = 0; j < 4; ++j) tops[j] = Simd::larger(Simd::load(score + i + j * W), tops[j]);
        for (int i = fours; i < whole; i += W) top = Simd::larger(Simd::load(score + i), top);
        for (V each : tops) top = Simd::larger(each, top);
        top = fold<GT>(top, [](V a, V b) { return Simd::larger(a, b); });
        const V before = Simd::repeat<GT>(m), most = before + Simd::set1(SLACK);
        V now = before, change = Simd::set1(1.0f);
        if (Simd::any_gt(top, most)) {
            now = Simd::where_gt(top, most, top, before);
            change = exp2(before - now);
            Simd::store_first<GT>(m, now);
        }
        Simd::store_first<GT>(alpha, change);
        const auto one = [&](int i) {
            const V weight = exp2(Simd::load(score + i) - now);
            Simd::store(score + i, weight);
            return weight;
        };
        for (int i = 0; i < fours; i += 4 * W) {
            for (int j = 0; j < 4; ++j) sums[j] = sums[j] + one(i + j * W);
            next.lines(4 * lines);
        }
        for (int i = fours; i < whole; i += W) {
            sum = sum + one(i);
            next.lines(lines);
        }
        for (V each : sums) sum = sum + each;
        if (whole < count) {
            const V weight = exp2(Simd::load(last) - now);
            Simd::store(last, weight);
            std::copy_n(last, count - whole, score + whole);
            sum = sum + weight;
        }
        sum = fold<GT>(sum, [](V a, V b) { return a + b; });
        Simd::store_first<GT>(l, Simd::fma(Simd::repeat<GT>(l), change, sum));
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
    float zeros = 0;
    for (int p = 0; p < block; ++p) {
        V x[CT];
        if constexpr (ONCE_A_GROUP<T, GT>) {
            const V w = Simd::set1(weight[p] * row[p].scale[group]);
            zeros += weight[p] * row[p].zero[group];
            for (int i = 0; i < CT; ++i)
                sum[i] = Simd::fma(Simd::get(T{}, row[p].data + int64_t(column + i) * W), w, sum[i]);
            next.lines(lines);
            continue;
        }
        const V scale = of_group<T>(row[p].scale, group), zero = of_group<T>(row[p].zero, group);
        for (int i = 0; i < CT; ++i) x[i] = value(T{}, row[p], column + i, scale, zero);
        for (int g = 0; g < GT; ++g) {
            const V w = Simd::set1(weight[p * GT + g]);
            for (int i = 0; i < CT; ++i) sum[i * GT + g] = Simd::fma(x[i], w, sum[i * GT + g]);
        }
        next.lines(lines);
    }
    if constexpr (ONCE_A_GROUP<T, GT>)
        for (V& each : sum) each = Simd::fma(Simd::set1(zeros), Simd::set1(1.0f), each);
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
