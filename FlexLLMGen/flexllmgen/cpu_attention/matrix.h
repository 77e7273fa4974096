// Tiles of bf16 keys and values with four or eight bf16 queries, by AMX; and the shapes of the processor's tiles.
// Included after dots.h. Sums lie as those of dots.h.
//
// Queries lie packed, [head][up to 8 queries together][pair of numbers][query][2]: the order that a second factor has.

// What the processor's tiles hold.
constexpr int SUMS = 0, MORE_SUMS = 1, KEYS = 2, QUERIES = 3, OUT = 4, WEIGHTS = 6, VALUES = 7;

inline thread_local int shape_now = 0;

// For numbers of SIZE bytes and GT queries. Codes' queries always fill a row: eight high bytes, eight low ones.
template <int SIZE, int GT>
inline void shape() {
    if (shape_now == 16 * SIZE + GT) return;
    shape_now = 16 * SIZE + GT;
    Tiles t{};
    const auto set = [&](int tile, int rows, int bytes) { t.rows[tile] = uint8_t(rows), t.row_bytes[tile] = uint16_t(bytes); };
    const int row = SIZE == 1 ? 64 : 4 * GT, parts = SIZE == 1 ? 2 * GT : GT;
    t.palette = 1;
    set(SUMS, 16, row), set(MORE_SUMS, 16, row), set(KEYS, 16, 64), set(QUERIES, 16, row);
    set(OUT, parts, 64), set(WEIGHTS, parts, LONG_BLOCK * SIZE), set(VALUES, LONG_BLOCK * SIZE / 4, 64);
    configure(t);
}

inline void leave_tiles() {
    if (shape_now) release();
    shape_now = 0;
}

constexpr int MOST_BYTES = 512;  // of a row

template <int GT>
inline bool by_matrix(const Call& c) {
    return GT >= 4 && by_dots(c) && 2 * c.H <= MOST_BYTES;
}

// Queries that dots.h has packed, [32 numbers][query][32], in the order of a second factor.
inline void turn_queries(const Call& c, int heads, float* q) {
    for (int h = 0; h < heads; ++h) {
        in_groups(int(c.N / c.K), [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            if (!by_matrix<GT>(c)) return;
            uint32_t words[GT * W];
            float* to = q + h * packed_floats(c) + g0 * c.H;
            for (int part = 0; part < c.H / PAIRS; ++part, to += GT * W) {
                std::memcpy(words, to, sizeof words);
                for (int i = 0; i < GT * W; ++i) std::memcpy(to + i, words + i % GT * W + i / GT, 4);
            }
        });
    }
}

// Scores of one head's block before they are scaled, [position][GT], and of what follows it up to LONG_BLOCK.
template <int GT>
inline void scores_matrix(const Call& c, const Rows& rows, const float* q, float* out, Fetcher& next) {
    static_assert(LONG_BLOCK == 32);
    tile_zero<SUMS>();
    tile_zero<MORE_SUMS>();
    for (int part = 0; part < c.H / PAIRS; ++part) {
        tile_load<QUERIES>(q + part * GT * W, 4 * GT);
        tile_load<KEYS>(rows.data + part * 64, rows.step);
        tile_bfloats<SUMS, KEYS, QUERIES>();
        tile_load<KEYS>(rows.data + part * 64 + 16 * rows.step, rows.step);
        tile_bfloats<MORE_SUMS, KEYS, QUERIES>();
        next.lines(LONG_BLOCK);
    }
    tile_store<SUMS>(out, 4 * GT);
    tile_store<MORE_SUMS>(out + 16 * GT, 4 * GT);
}

// Weights [position][GT] of a block as bf16, [GT][LONG_BLOCK].
template <int GT>
inline void turn_weights(const float* weight, int count, uint16_t* to) {
    constexpr int EACH = PAIRS / GT;  // positions of a vector
    alignas(64) uint16_t order[PAIRS];
    for (int i = 0; i < PAIRS; ++i) order[i] = uint16_t(i % EACH * GT + i / EACH);
    V x[GT];
    for (int i = 0; i < GT; ++i, count -= PAIRS, weight += PAIRS) {
        const uint32_t some = count >= PAIRS ? ~0u : count > 0 ? (1u << count) - 1 : 0;
        const V low = _mm512_maskz_loadu_ps(__mmask16(some), weight);
        const V high = _mm512_maskz_loadu_ps(__mmask16(some >> 16), weight + W);
        x[i] = (V)_mm512_permutexvar_epi16(load_dots(order), (Dots)_mm512_cvtne2ps_pbh(high, low));
    }
    // A quarter of a vector is a query's positions now, or of eight queries two queries' halves.
    if constexpr (GT == 8) {
        for (int i = 0; i < GT; i += 2) {
            const __m512d a = (__m512d)x[i], b = (__m512d)x[i + 1];
            x[i] = (V)_mm512_unpacklo_pd(a, b), x[i + 1] = (V)_mm512_unpackhi_pd(a, b);
        }
        in_order(x[0], x[2], x[4], x[6]);
        in_order(x[1], x[3], x[5], x[7]);
    } else {
        in_order(x[0], x[1], x[2], x[3]);
    }
    for (int i = 0; i < GT; ++i) Simd::store((float*)(to + i * LONG_BLOCK), x[i]);
}

// Adds weighted values of one head.
template <int GT>
inline void values_matrix(const Call& c, const Rows& rows, int block, const float* weight, const float* alpha, float* acc,
                          Fetcher& next) {
    const int parts = int(c.H / PAIRS);
    alignas(64) uint16_t weights[GT * LONG_BLOCK];
    alignas(64) Dots x[2 * MOST_BYTES / 64][LONG_BLOCK / 2];
    turn_weights<GT>(weight, block * GT, weights);
    for (int p = 0; p < LONG_BLOCK / 2; ++p) {
        const char *a = rows.data + 2 * p * rows.step, *b = a + rows.step;
        for (int part = 0; part < parts; ++part) {
            const Dots u = load_dots(a + part * 64), v = load_dots(b + part * 64);
            x[2 * part][p] = _mm512_unpacklo_epi16(u, v);
            x[2 * part + 1][p] = _mm512_unpackhi_epi16(u, v);
        }
        next.lines(2 * parts);
    }
    tile_load<WEIGHTS>(weights, LONG_BLOCK * 2);
    // Once for many blocks: the largest score seldom moves.
    if (std::any_of(alpha, alpha + GT, [](float each) { return each != 1; }))
        for (int i = 0; i < 2 * parts * GT; ++i)
            Simd::store(acc + i * W, Simd::mul(Simd::load(acc + i * W), Simd::set1(alpha[i % GT])));
    for (int i = 0; i < 2 * parts; ++i) {
        tile_load<OUT>(acc + i * GT * W, 64);
        tile_load<VALUES>(x[i], 64);
        tile_bfloats<OUT, WEIGHTS, VALUES>();
        tile_store<OUT>(acc + i * GT * W, 64);
    }
}

// As attend_codes, of bf16.
template <int GT>
inline void attend_matrix(const Call& c, int heads, int block, int g0, const char* data, const float* bias, const float* q,
                          float* score, float* alpha, const Partial& to, Fetcher& values_now, Fetcher& keys_next) {
    const int64_t queries = c.N / c.K, bytes = c.H * 2;
    alignas(64) char memory[LONG_BLOCK * MOST_BYTES];
    shape<2, GT>();
    for (int h = 0; h < heads; ++h) {
        const Rows keys(data + h * bytes, c.position_bytes, block, bytes, memory);
        scores_matrix<GT>(c, keys, q + h * packed_floats(c) + g0 * c.H, score + h * block * GT, values_now);
    }
    // Not sooner: a vector that two rows of a tile make up can be loaded only once both lie in memory.
    const V factor = Simd::set1(c.factor * LOG2E);
    for (int i = 0; i < heads * block * GT; i += W) Simd::store(score + i, Simd::mul(factor, Simd::load(score + i)));
    weigh<GT>(heads, block, bias, score, to.m + g0 * heads, to.l + g0 * heads, alpha);
    for (int h = 0; h < heads; ++h) {
        const Rows values(data + c.half_bytes + h * bytes, c.position_bytes, block, bytes, memory);
        values_matrix<GT>(c, values, block, score + h * block * GT, alpha + h * GT, to.acc + (h * queries + g0) * c.H,
                          keys_next);
    }
}
