// Tiles of bf16 keys and values with bf16 queries, by the instruction that multiplies pairs of bf16 and adds them up in
// fp32; included after tiles.h where it exists.
//
// Queries lie packed: [head][up to 8 queries together][32 numbers of the head][query][32]. Sums lie as those of
// tiles.h, but each 32 numbers in the order in which interleaving two rows leaves them. Weights are rounded to bf16 when
// they multiply, as values are.

constexpr int PAIRS = 2 * W;  // bf16 in a vector
using Dots = __m512i;

inline V dot(V sum, Dots a, Dots b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
inline Dots load_dots(const void* p) { return _mm512_loadu_si512(p); }
inline bool by_dots(const Call& c) { return c.q_type == 2 && c.kv_type == 2 && c.H % PAIRS == 0; }

inline void pack_dots(const Call& c, const Piece& piece, float* to) {
    const int queries = int(c.N / c.K);
    for (int h = 0; h < piece.heads; ++h) {
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            const int64_t first = int64_t(h) * queries + g0;
            for (int g = 0; g < GT; ++g) {
                const char* from = c.q + (piece.sequence * c.N + int64_t(piece.head) * queries + first + g) * c.H * 2;
                for (int part = 0; part < c.H / PAIRS; ++part)
                    _mm512_storeu_si512(to + first * c.H + (part * GT + g) * W, load_dots(from + part * 64));
            }
        });
    }
}

template <int GT>
inline void scores_dots(const Call& c, const Row* row, int rows, int g0, float* out, Fetcher& next) {
    constexpr int R = NR / GT, AT_ONCE = R < 2 ? R : 2;
    const int parts = int(c.H / PAIRS), lines = parts;
    const int64_t first = int64_t(g0) * c.H;
    const V factor = Simd::set1(c.factor * LOG2E);
    for (int i = 0; i < rows; i += R) {
        V sum[NR];
#pragma GCC unroll 16
        for (int r = 0; r < R; r += AT_ONCE) {
            const char* k[AT_ONCE];
            const float* q[AT_ONCE];
            V s[AT_ONCE * GT];
            for (int a = 0; a < AT_ONCE; ++a) {
                const Row& each = row[std::min(i + r + a, rows - 1)];
                k[a] = each.data;
                q[a] = each.q + first;
            }
            for (V& each : s) each = Simd::zero();
            const auto add = [&](auto same) {
                for (int part = 0; part < parts; ++part) {
                    Dots x[AT_ONCE];
                    for (int a = 0; a < AT_ONCE; ++a) x[a] = load_dots(k[a] + part * 64);
                    for (int g = 0; g < GT; ++g) {
                        const int64_t at = (part * GT + g) * W;
                        Dots first_q = load_dots(q[0] + at);
                        // Loaded once, and not with each use.
                        if (decltype(same)::value) asm("" : "+v"(first_q));
                        for (int a = 0; a < AT_ONCE; ++a)
                            s[a * GT + g] =
                                dot(s[a * GT + g], x[a], decltype(same)::value ? first_q : load_dots(q[a] + at));
                    }
                }
            };
            if (q[0] == q[AT_ONCE - 1])
                add(std::true_type{});
            else
                add(std::false_type{});
            for (int a = 0; a < AT_ONCE * GT; ++a) sum[r * GT + a] = s[a];
            next.lines(AT_ONCE * lines);
            for (int a = 0; a < AT_ONCE && g0 == 0; ++a) {
                const char* soon = row[std::min(i + r + a + 4, rows - 1)].data;
                for (int line = 0; line < lines; ++line) __builtin_prefetch(soon + 64 * line, 0, 3);
            }
        }
        Simd::sums(sum, out + i * GT);
        Simd::store(out + i * GT, Simd::mul(factor, Simd::load(out + i * GT)));
    }
}

// Numbers [at, at + W) of `count`; those past the count are zero.
inline V some_of(const float* from, int at, int count) {
    const int left = count - at;
    const uint32_t some = left >= W ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    return _mm512_maskz_loadu_ps(__mmask16(some), from + at);
}

// Weights [position][GT] to bf16, [pair of positions][GT][2]; a missing last one counts nothing.
template <int GT>
inline void pair_weights(const float* weight, int count, uint32_t* to) {
    alignas(32) uint16_t order[W];
    for (int j = 0; j < W; ++j) order[j] = uint16_t((2 * (j / (2 * GT)) + j % 2) * GT + j / 2 % GT);
    const __m256i places = _mm256_load_si256((const __m256i*)order);
    for (int i = 0; i < count; i += W) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(some_of(weight, i, count));
        _mm256_storeu_si256((__m256i*)(to + i / 2), _mm256_permutexvar_epi16(places, rounded));
    }
}

// Adds weighted values of one head, CT times 32 of it from part `part` on.
template <int GT, int CT>
inline void add_dots(const Row* row, int block, const uint32_t* pairs, const float* alpha, float* acc, int part,
                     Fetcher& next) {
    V sum[2 * CT * GT];
    acc += int64_t(part) * 2 * GT * W;
    for (int i = 0; i < 2 * CT; ++i)
        for (int g = 0; g < GT; ++g) sum[i * GT + g] = Simd::mul(Simd::load(acc + (i * GT + g) * W), Simd::set1(alpha[g]));
    for (int p = 0; p < block; p += 2, pairs += GT) {
        const char *a = row[p].data + part * 64, *b = row[std::min(p + 1, block - 1)].data + part * 64;
        Dots x[2 * CT];
        for (int i = 0; i < CT; ++i) {
            const Dots u = load_dots(a + i * 64), v = load_dots(b + i * 64);
            x[2 * i] = _mm512_unpacklo_epi16(u, v);
            x[2 * i + 1] = _mm512_unpackhi_epi16(u, v);
        }
        for (int g = 0; g < GT; ++g) {
            const Dots w = _mm512_set1_epi32(int(pairs[g]));
            for (int i = 0; i < 2 * CT; ++i) sum[i * GT + g] = dot(sum[i * GT + g], x[i], w);
        }
        next.lines(2 * CT);
    }
    for (int i = 0; i < 2 * CT; ++i)
        for (int g = 0; g < GT; ++g) Simd::store(acc + (i * GT + g) * W, sum[i * GT + g]);
}

template <int GT>
inline void values_dots(const Call& c, const Row* row, int heads, int block, int g0, const float* weight,
                        const float* alpha, float* acc, Fetcher& next) {
    constexpr int CT = NR / GT / 2 < 4 ? NR / GT / 2 : 4;
    const int parts = int(c.H / PAIRS), queries = int(c.N / c.K);
    uint32_t pairs[LONG_BLOCK * GT / 2 + W];
    acc += int64_t(g0) * c.H;
    for (int h = 0; h < heads; ++h, row += block, weight += block * GT, alpha += GT, acc += queries * c.H) {
        pair_weights<GT>(weight, block * GT, pairs);
        int part = 0;
        const auto take = [&](auto count) {
            constexpr int N = decltype(count)::value;
            if constexpr (N <= CT)
                for (; parts - part >= N; part += N) add_dots<GT, N>(row, block, pairs, alpha, acc, part, next);
        };
        take(std::integral_constant<int, 4>{});
        take(std::integral_constant<int, 2>{});
        take(std::integral_constant<int, 1>{});
    }
}

// Sums of 32 numbers in the order of interleaved rows, back in their own.
inline void in_order(V& low, V& high) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const V both = _mm512_permutex2var_ps(low, first, high);
    high = _mm512_permutex2var_ps(low, second, high);
    low = both;
}

// Turns quarters of four vectors around: quarter i of vector j goes to quarter j of vector i.
inline void in_order(V& a, V& b, V& c, V& d) {
    const V w = _mm512_shuffle_f32x4(a, b, 0x44), x = _mm512_shuffle_f32x4(c, d, 0x44);
    const V y = _mm512_shuffle_f32x4(a, b, 0xee), z = _mm512_shuffle_f32x4(c, d, 0xee);
    a = _mm512_shuffle_f32x4(w, x, 0x88), b = _mm512_shuffle_f32x4(w, x, 0xdd);
    c = _mm512_shuffle_f32x4(y, z, 0x88), d = _mm512_shuffle_f32x4(y, z, 0xdd);
}
