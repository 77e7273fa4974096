// Weighted sums of codes of 8 bits, and a block of both; included after codes.h.
//
// A block's weights times the scale of their group become whole numbers of 16 bits, as queries do; four rows' codes are
// interleaved, so that one instruction adds up four positions.

// From where in packed bytes those of [4 positions][GT][4] come.
template <int GT>
struct Places {
    alignas(64) uint8_t at[CHUNK];
    Places() {
        for (int i = 0; i < CHUNK; ++i) {
            const int word = i / 4, from = (word / GT * 4 + i % 4) * GT + word % GT;
            at[i] = uint8_t(from % W / 4 * W + from / W * 4 + from % 4);
        }
    }
};

// A block's weights times the scales of one group, in two signed bytes: of each 64 [4 positions][GT][4].
template <int GT>
struct Weights {
    static constexpr int COUNT = LONG_BLOCK * GT / W;  // vectors of fp32
    alignas(64) uint32_t high[(COUNT + 3) / 4 * W], low[(COUNT + 3) / 4 * W];
    alignas(64) float step[W], zeros[W];  // of each query: what one stands for, the sum of weighted zeros

    // With each vector `lines` lines are fetched.
    void set(const float* weight, int block, const float* scale, const float* zero, Fetcher& next, int lines) {
        static const Places<GT> places;
        const __m512i position = _mm512_setr_epi32(0, 1 / GT, 2 / GT, 3 / GT, 4 / GT, 5 / GT, 6 / GT, 7 / GT, 8 / GT,
                                                   9 / GT, 10 / GT, 11 / GT, 12 / GT, 13 / GT, 14 / GT, 15 / GT);
        V x[(COUNT + 3) / 4 * 4], top = Simd::set1(1e-30f), sum = Simd::zero();
        for (V& each : x) each = Simd::zero();
        for (int i = 0; i < COUNT; ++i) {
            const V w = some_of(weight, i * W, block * GT);
            const V s = _mm512_permutexvar_ps(position, Simd::load(scale + i * W / GT));
            const V z = _mm512_permutexvar_ps(position, Simd::load(zero + i * W / GT));
            x[i] = Simd::mul(w, s);
            top = Simd::larger(_mm512_abs_ps(x[i]), top);
            sum = Simd::fma(w, z, sum);
            next.lines(lines);
        }
        top = fold<GT>(top, [](V a, V b) { return Simd::larger(a, b); });
        Simd::store(step, Simd::mul(top, Simd::set1(1 / MOST)));
        Simd::store(zeros, fold<GT>(sum, [](V a, V b) { return a + b; }));
        const V by = _mm512_div_ps(Simd::set1(MOST), top);
        const Codes half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255), order = load_codes(places.at);
        for (int i = 0; i < COUNT; i += 4) {
            Codes n[4];
            for (int j = 0; j < 4; ++j) n[j] = _mm512_cvtps_epi32(Simd::mul(x[i + j], by));
            const Codes a = _mm512_packs_epi32(n[0], n[1]), b = _mm512_packs_epi32(n[2], n[3]);
            const Codes lower = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
            const Codes upper = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                                   _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
            _mm512_store_si512(low + i / 4 * W, _mm512_permutexvar_epi8(order, lower));
            _mm512_store_si512(high + i / 4 * W, _mm512_permutexvar_epi8(order, upper));
        }
    }
};

// Interleaves 64 codes of four rows, three of which lie so many bytes after the first: [column][4].
inline void interleave(const char* v, int64_t second, int64_t third, int64_t fourth, Codes* to) {
    const Codes x = load_codes(v), y = load_codes(v + second), z = load_codes(v + third), w = load_codes(v + fourth);
    const Codes a = _mm512_unpacklo_epi8(x, y), b = _mm512_unpackhi_epi8(x, y);
    const Codes c = _mm512_unpacklo_epi8(z, w), d = _mm512_unpackhi_epi8(z, w);
    to[0] = _mm512_unpacklo_epi16(a, c), to[1] = _mm512_unpackhi_epi16(a, c);
    to[2] = _mm512_unpacklo_epi16(b, d), to[3] = _mm512_unpackhi_epi16(b, d);
}

// Adds W columns of a query's weighted codes, of which each one stands for `step`, and of the zeros.
inline void add_codes(float* to, Codes sum, float alpha, float step, float zeros) {
    const V before = Simd::fma(Simd::load(to), Simd::set1(alpha), Simd::set1(zeros));
    Simd::store(to, Simd::fma(_mm512_cvtepi32_ps(sum), Simd::set1(step), before));
}

// Adds weighted values of one head.
template <int GT>
inline void values_codes(const Call& c, const Rows& rows, int block, const float* weight, const float* alpha,
                         const float* scale, const float* zero, float* acc, Fetcher& next) {
    constexpr int CT = GT > 4 ? 16 / GT : 4, FOURS = LONG_BLOCK / 4;
    const int chunks = int(c.H / CHUNK), width = int(c.group_size / CHUNK);
    // Of all groups at once: none waits for another.
    Weights<GT> all[MOST_GROUPS];
    // Half of the lines with weights, half with what is added; of one query's, whose weights are few, all with that.
    const int lines = GT > 1 ? (LONG_BLOCK / 2 * width + Weights<GT>::COUNT - 1) / Weights<GT>::COUNT : 0;
    for (int i = 0; i < c.groups; ++i)
        all[i].set(weight, block, scale + i * LONG_BLOCK, zero + i * LONG_BLOCK, next, lines);
    for (int chunk = 0; chunk < chunks; ++chunk, acc += 4 * GT * W) {
        const Weights<GT>& bytes = all[chunk / width];
        const char* v = rows.data + chunk * CHUNK;
        const auto add = [&](int i, int g, Codes sum) {
            add_codes(acc + (i * GT + g) * W, sum, alpha[g], bytes.step[g], bytes.zeros[g]);
        };
        if constexpr (GT == 1) {
            Codes high[4], low[4];
            for (int i = 0; i < 4; ++i) high[i] = low[i] = _mm512_setzero_si512();
#pragma GCC unroll 1
            for (int four = 0; four < FOURS; ++four) {
                Codes x[4];
                interleave(v + 4 * four * rows.step, rows.step, 2 * rows.step, 3 * rows.step, x);
                const Codes u = _mm512_set1_epi32(int(bytes.high[four])), l = _mm512_set1_epi32(int(bytes.low[four]));
                for (int i = 0; i < 4; ++i) high[i] = products(high[i], x[i], u), low[i] = products(low[i], x[i], l);
                next.lines(4);
            }
            for (int i = 0; i < 4; ++i) add(i, 0, _mm512_add_epi32(times_256(high[i]), low[i]));
            continue;
        }
        alignas(64) Codes x[4 * FOURS];
        // Unrolled, these loops would want more registers than there are.
#pragma GCC unroll 1
        for (int four = 0; four < FOURS; ++four) {
            interleave(v + 4 * four * rows.step, rows.step, 2 * rows.step, 3 * rows.step, x + 4 * four);
            next.lines(2);
        }
        for (int i = 0; i < 4; i += CT) {
            Codes sum[CT * GT];
            for (Codes& each : sum) each = _mm512_setzero_si512();
            const auto pass = [&](const uint32_t* weights) {
#pragma GCC unroll 1
                for (int four = 0; four < FOURS; ++four) {
#pragma GCC unroll 8
                    for (int g = 0; g < GT; ++g) {
                        const Codes w = _mm512_set1_epi32(int(weights[four * GT + g]));
                        for (int j = 0; j < CT; ++j)
                            sum[j * GT + g] = products(sum[j * GT + g], x[4 * four + i + j], w);
                    }
                }
            };
            pass(bytes.high);
            for (Codes& each : sum) each = times_256(each);
            pass(bytes.low);
            for (int j = 0; j < CT; ++j)
                for (int g = 0; g < GT; ++g) add(i + j, g, sum[j * GT + g]);
        }
    }
}

// A block of a piece's heads for GT queries of each, from `g0` on. `data` is where its keys begin; scales and zeros lie
// as turn_groups leaves them, keys' before values'.
template <int GT>
inline void attend_codes(const Call& c, int heads, int block, int g0, const char* data, const float* bias, const float* q,
                         const float* scale, const float* zero, float* score, float* alpha, const Partial& to,
                         Fetcher& next) {
    const int64_t groups = c.groups * LONG_BLOCK, queries = c.N / c.K;
    alignas(64) char memory[LONG_BLOCK * MOST_GROUPS * CHUNK];
    const int vectors = LONG_BLOCK * GT / W, left = int(c.H / CHUNK) * LONG_BLOCK / W * (W - LINES_A_CHUNK);
    const int lines = GT > 1 ? (left + vectors - 1) / vectors : 0;
    for (int h = 0; h < heads; ++h) {
        const Rows keys(data + h * c.H, c.kv_bytes.position, block, LONG_BLOCK, c.H, memory);
        const float* packed = q + h * packed_codes(c) + group_count(g0) * (c.H / CHUNK) * PACKED;
        scores_codes<GT>(c, keys, block, packed, scale + h * groups, zero + h * groups, h + 1 == heads,
                         score + h * block * GT, next);
    }
    weigh<GT>(heads, block, bias, score, to.m + g0 * heads, to.l + g0 * heads, alpha, next, lines);
    scale += heads * groups, zero += heads * groups, data += c.kv_bytes.half;
    for (int h = 0; h < heads; ++h) {
        const Rows values(data + h * c.H, c.kv_bytes.position, block, LONG_BLOCK, c.H, memory);
        values_codes<GT>(c, values, block, score + h * block * GT, alpha + h * GT, scale + h * groups, zero + h * groups,
                         to.acc + (h * queries + g0) * c.H, next);
    }
}
