// Tiles of bf16 keys and values with four or eight bf16 queries, by AMX; and the shapes of the processor's tiles.
// Included after dots.h.
//
// Queries lie packed, [head][up to 8 queries together][pair of numbers][query][2]: the order that a second factor has.
// Sums lie as those of tiles.h, but each 32 numbers as the first of each pair and then the second.

constexpr int MOST_BYTES = 512;  // of a row
constexpr int TILE_ROWS = 16, BLOCK_TILES = LONG_BLOCK / TILE_ROWS;
// What is fetched with a tile of 16 lines; the others are fetched while weights are made, and turned.
constexpr int LINES_A_SCORE_TILE = 8, LINES_A_VALUE_TILE = 13;

// What the processor's eight tiles hold: while scores are made, and while values are added.
constexpr int SUMS = 0, KEYS = 4, QUERIES = 6;
constexpr int OUT = 0, WEIGHTS = 4, VALUES = 6;

enum class Work { none, scores, values };
inline thread_local int shape_now = 0;

// For GT queries, or columns of queries.
template <Work WORK, int GT>
inline void shape() {
    if (shape_now == 32 * int(WORK) + GT) return;
    shape_now = 32 * int(WORK) + GT;
    Tiles t{};
    const auto set = [&](int tile, int count, int rows, int bytes) {
        for (int i = tile; i < tile + count; ++i) t.rows[i] = uint8_t(rows), t.row_bytes[i] = uint16_t(bytes);
    };
    t.palette = 1;
    if (WORK == Work::scores) {
        static_assert(SUMS + BLOCK_TILES <= KEYS);
        set(SUMS, BLOCK_TILES, 16, 4 * GT), set(KEYS, 2, 16, 64), set(QUERIES, 2, 16, 4 * GT);
    } else {
        set(OUT, 4, 2 * GT, 64), set(WEIGHTS, 2, 2 * GT, 64), set(VALUES, 2, 16, 64);
    }
    configure(t);
}

inline void leave_tiles() {
    if (shape_now) release();
    shape_now = 0;
}

template <int GT>
inline bool by_matrix(const Call& c) {
    return GT >= 4 && by_dots(c) && 2 * c.H <= MOST_BYTES;
}

// Calls f(0), f(1), ... f(N - 1), of numbers that are known when this is compiled.
template <int N, class F>
inline void each_of(F&& f) {
    if constexpr (N > 0) {
        each_of<N - 1>(f);
        f(std::integral_constant<int, N - 1>{});
    }
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
    each_of<BLOCK_TILES>([&](auto i) { tile_zero<SUMS + i>(); });
    for (int part = 0; part < c.H / PAIRS; ++part) {
        tile_load<QUERIES>(q + part * GT * W, 4 * GT);
        each_of<BLOCK_TILES>([&](auto i) {
            tile_load<KEYS + i % 2>(rows.data + part * 64 + i * TILE_ROWS * rows.step, rows.step);
            tile_bfloats<SUMS + i, KEYS + i % 2, QUERIES>();
            next.lines(LINES_A_SCORE_TILE);
        });
    }
    each_of<BLOCK_TILES>([&](auto i) { tile_store<SUMS + i>(out + i * TILE_ROWS * GT, 4 * GT); });
}

// Words [position][GT] of TILE_ROWS positions as [GT][position].
template <int GT>
inline void turn_words(const V* x, V* to) {
    if constexpr (GT == 8) {
        const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
        for (int i = 0; i < 4; ++i) {
            to[i] = _mm512_permutex2var_ps(x[2 * i], first, x[2 * i + 1]);
            to[4 + i] = _mm512_permutex2var_ps(x[2 * i], second, x[2 * i + 1]);
        }
        in_order(to[4], to[5], to[6], to[7]);
    } else {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (int i = 0; i < 4; ++i) to[i] = _mm512_permutexvar_ps(order, x[i]);
    }
    in_order(to[0], to[1], to[2], to[3]);
}

// Weights [position][GT] of a block as first factors, of each TILE_ROWS positions [2][GT][position]: a word of a weight in
// bf16 and a zero, then of a zero and the weight. Times a row's pairs of numbers they give the first of each, and the second;
// beside a value that is infinite or no number, also one whose weight is 0, the other of its pair is no number.
template <int GT>
inline void pair_with_zeros(const float* weight, int count, uint32_t* to) {
    const Dots half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000u));
    for (int tile = 0; tile < BLOCK_TILES; ++tile, to += 2 * GT * W) {
        V some[GT], x[GT];
        for (int i = 0; i < GT; ++i) some[i] = some_of(weight, (tile * GT + i) * W, count);
        turn_words<GT>(some, x);
        for (int g = 0; g < GT; ++g) {
            const Dots rounded = _mm512_add_epi32((Dots)x[g], half);
            _mm512_store_si512(to + g * W, _mm512_srli_epi32(rounded, 16));
            _mm512_store_si512(to + (GT + g) * W, _mm512_and_si512(rounded, upper));
        }
    }
}

// Adds weighted values of one head, N times 32 of it; weights as pair_with_zeros leaves them.
template <int GT, int N>
inline void add_tiles(const char* data, int64_t step, const uint32_t* weights, float* acc, Fetcher& next) {
    each_of<N>([&](auto part) { tile_load<OUT + part>(acc + part * 2 * GT * W, 64); });
    each_of<BLOCK_TILES>([&](auto i) {
        tile_load<WEIGHTS + i % 2>(weights + i * 2 * GT * W, 64);
        each_of<N>([&](auto part) {
            tile_load<VALUES + part % 2>(data + i * TILE_ROWS * step + part * 64, step);
            tile_bfloats<OUT + part, WEIGHTS + i % 2, VALUES + part % 2>();
            next.lines(LINES_A_VALUE_TILE);
        });
    });
    each_of<N>([&](auto part) { tile_store<OUT + part>(acc + part * 2 * GT * W, 64); });
}

template <int GT>
inline void values_matrix(const Call& c, const Rows& rows, const uint32_t* weights, const float* alpha, float* acc,
                          Fetcher& next) {
    const int parts = int(c.H / PAIRS);
    // Once for many blocks: the largest score seldom moves.
    if (std::any_of(alpha, alpha + GT, [](float each) { return each != 1; }))
        for (int i = 0; i < 2 * parts * GT; ++i)
            Simd::store(acc + i * W, Simd::mul(Simd::load(acc + i * W), Simd::set1(alpha[i % GT])));
    int part = 0;
    const auto take = [&](auto count) {
        constexpr int N = decltype(count)::value;
        for (; parts - part >= N; part += N)
            add_tiles<GT, N>(rows.data + part * 64, rows.step, weights, acc + part * 2 * GT * W, next);
    };
    take(std::integral_constant<int, 4>{});
    take(std::integral_constant<int, 2>{});
    take(std::integral_constant<int, 1>{});
}

// Sums of 32 numbers, the first of each pair and the second, in order.
inline void pairs_in_order(V& low, V& high) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const V both = _mm512_permutex2var_ps(low, first, high);
    high = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(8)), high);
    low = both;
}

// As attend_codes, of bf16.
template <int GT>
inline void attend_matrix(const Call& c, int heads, int block, int g0, const char* data, const float* bias, const float* q,
                          float* score, float* alpha, const Partial& to, Fetcher& next) {
    const int64_t queries = c.N / c.K, bytes = c.H * 2;
    const int parts = int(c.H / PAIRS), with_weights = (TILE_ROWS - LINES_A_VALUE_TILE) * BLOCK_TILES * parts;
    alignas(64) char memory[LONG_BLOCK * MOST_BYTES];
    alignas(64) uint32_t weights[2][BLOCK_TILES * 2 * GT * W];
    shape<Work::scores, GT>();
    for (int h = 0; h < heads; ++h) {
        const Rows keys(data + h * bytes, c.kv_bytes.position, block, LONG_BLOCK, bytes, memory);
        scores_matrix<GT>(c, keys, q + h * packed_floats(c) + g0 * c.H, score + h * block * GT, next);
    }
    // Not sooner: a vector that two rows of a tile make up can be loaded only once both lie in memory.
    const V factor = Simd::set1(c.factor * LOG2E);
    for (int i = 0; i < heads * block * GT; i += W) Simd::store(score + i, Simd::mul(factor, Simd::load(score + i)));
    weigh<GT>(heads, block, bias, score, to.m + g0 * heads, to.l + g0 * heads, alpha, next,
              (TILE_ROWS - LINES_A_SCORE_TILE) * parts / GT);
    shape<Work::values, GT>();
    next.lines(with_weights);
    pair_with_zeros<GT>(score, block * GT, weights[0]);
    for (int h = 0; h < heads; ++h) {
        // Of the next head before this one's values: a tile is loaded from memory, some time after that was written.
        if (h + 1 < heads) {
            next.lines(with_weights);
            pair_with_zeros<GT>(score + (h + 1) * block * GT, block * GT, weights[(h + 1) % 2]);
        }
        const Rows values(data + c.kv_bytes.half + h * bytes, c.kv_bytes.position, block, LONG_BLOCK, bytes, memory);
        values_matrix<GT>(c, values, weights[h % 2], alpha + h * GT, to.acc + (h * queries + g0) * c.H, next);
    }
}
