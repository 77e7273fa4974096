// Tiles of codes of 8 bits with four or eight queries of 16, by AMX; included after code_values.h and matrix.h.
//
// Codes and queries are multiplied as in codes.h. A row of a tile holds 64 bytes: so many numbers of a key, or weights of
// so many positions. Tiles are slow beside vectors and a core looks ahead only so far: some are queued, then what those
// before them left in memory is worked on. Scales and zeros lie [position][GROUPS]: those of a piece's heads, one after
// another, and then nothing.

static_assert(CODE_BLOCK == CHUNK);

// Lines of the next block, 64 of keys and 64 of values a chunk, that are fetched while this one's chunk is computed: its keys'
// products, what these come to, the weights of that; its values' weights, what is interleaved, what is added up.
constexpr int LINES_OF_PRODUCTS = 16, LINES_OF_SCORES = 32, LINES_OF_WEIGHING = 16;
constexpr int LINES_OF_WEIGHTS = 32, LINES_OF_COLUMNS = 16, LINES_OF_SUMS = 16;

constexpr int GROUPS = W;
constexpr int LARGER_SIZE = 0b1011;  // Told to the instruction that compares: by size, and without a sign.

// Other numbers of queries come in groups of which some are too small for tiles: then none goes through them.
inline bool in_code_tiles(const Call& c) { return by_codes(c) && c.N / c.K % 4 == 0; }

// Loads a number into some lanes. By the assembler's name: compilers take two instructions.
inline void broadcast_into(V& x, __mmask16 lanes, const float* from) {
    asm("vbroadcastss %2, %0 %{%1%}" : "+v"(x) : "Yk"(lanes), "m"(*from));
}

// A number of each of W / GT positions, as often as there are queries.
template <int GT>
inline V of_positions(const float* from) {
    V x = Simd::set1(from[0]);
    if constexpr (GT == 8) broadcast_into(x, 0xff00, from + GROUPS);
    if constexpr (GT == 4) {
        broadcast_into(x, 0x00f0, from + GROUPS);
        broadcast_into(x, 0x0f00, from + 2 * GROUPS);
        broadcast_into(x, 0xf000, from + 3 * GROUPS);
    }
    return x;
}

// Positions that tiles of keys, and words of weights, are made of: as many as a block has, and what fills the last tile.
inline int in_tiles(int block) { return (block + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }

// Products of N chunks of TILE_ROWS rows with queries that lie in tiles: [chunk][row][8 queries' high bytes, then low ones].
template <int N>
inline void code_products(const char* row, int64_t step, Codes* to, Fetcher& next) {
    each_of<N>([&](auto i) {
        tile_zero<SUMS + i>();
        tile_load<KEYS + i>(row + i * CHUNK, step);
        tile_unsigned_signed<SUMS + i, KEYS + i, QUERIES + i>();
        tile_store<SUMS + i>(to + i * TILE_ROWS, 64);
        next.lines(LINES_OF_PRODUCTS * TILE_ROWS / CODE_BLOCK);
    });
}

// What they come to, in `out` or added to it; `q` as pack_codes leaves it, `scale` and `zero` of each chunk's group.
template <int GT, int N>
inline void add_products(const Codes* products, const float* q, const float* const* scale, const float* const* zero,
                         bool add, float* out, Fetcher& next) {
    V of_zero[N];
    for (int i = 0; i < N; ++i) of_zero[i] = Simd::repeat<8>(q + i * PACKED + CHUNK / 4 * W + W);
    const V upper = Simd::repeat<8>(q + CHUNK / 4 * W), lower = Simd::repeat<8>(q + CHUNK / 4 * W + 8);
    for (int p = 0; p < TILE_ROWS; p += 2) {
        V row[2];
        for (int r = 0; r < 2; ++r)
            for (int i = 0; i < N; ++i) {
                const V x = _mm512_cvtepi32_ps(products[i * TILE_ROWS + p + r]), s = Simd::set1(scale[i][(p + r) * GROUPS]);
                row[r] = i ? Simd::fma(x, s, row[r]) : Simd::mul(x, s);
            }
        // Two positions side by side.
        const V high = (V)_mm512_shuffle_f64x2((__m512d)row[0], (__m512d)row[1], 0x44);
        const V low = (V)_mm512_shuffle_f64x2((__m512d)row[0], (__m512d)row[1], 0xee);
        V sum = Simd::fma(high, upper, Simd::mul(low, lower));
        for (int i = 0; i < N; ++i) sum = Simd::fma(of_zero[i], of_positions<8>(zero[i] + p * GROUPS), sum);
        float* to = out + p * GT;
        if constexpr (GT == 8) {
            Simd::store(to, add ? sum + Simd::load(to) : sum);
        } else {
            const __m512i four = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 0, 0, 0, 0, 0, 0, 0, 0);
            const __m256 both = _mm512_castps512_ps256(_mm512_permutexvar_ps(four, sum));
            _mm256_storeu_ps(to, add ? both + _mm256_loadu_ps(to) : both);
        }
        next.lines(N * LINES_OF_SCORES * 2 / CODE_BLOCK);
    }
}

// Scores of one head's block, [position][GT], and of what follows it up to a whole tile: of N chunks from `chunk` on.
template <int GT, int N>
inline void scores_code_tiles(const Call& c, const Rows& rows, int block, const float* q, const float* scale,
                              const float* zero, int chunk, float* out, Fetcher& next) {
    const int width = int(c.group_size / CHUNK), tiles = in_tiles(block) / TILE_ROWS;
    alignas(64) Codes products[2][N * TILE_ROWS];
    const float *scales[N], *zeros[N];
    q += chunk * PACKED;
    each_of<N>([&](auto i) {
        scales[i] = scale + (chunk + i) / width, zeros[i] = zero + (chunk + i) / width;
        tile_load<QUERIES + i>(q + i * PACKED, 64);
    });
    const char* row = rows.data + chunk * CHUNK;
    code_products<N>(row, rows.step, products[0], next);
    for (int i = 1; i <= tiles; ++i) {
        row += TILE_ROWS * rows.step;
        if (i < tiles) code_products<N>(row, rows.step, products[i % 2], next);
        add_products<GT, N>(products[(i - 1) % 2], q, scales, zeros, chunk > 0, out, next);
        for (int j = 0; j < N; ++j) scales[j] += TILE_ROWS * GROUPS, zeros[j] += TILE_ROWS * GROUPS;
        out += TILE_ROWS * GT;
    }
}

// A block's weights times the scales of one group as a first factor: the queries' upper bytes, a query a row, and then
// the lower ones. A word of a row holds four positions, POSITIONS<GT> apart in another order (see place).
template <int GT>
struct CodeWeights {
    static constexpr int COUNT = CODE_BLOCK * GT / W, POSITIONS = W / GT;  // vectors of fp32, positions in one
    alignas(64) V rows[2 * GT];
    alignas(64) float step[W], zeros[W];  // of each query: what one stands for, the sum of weighted zeros

    // The first position of word `i` of a row; those after it come 2, 1 and 3 times POSITIONS later.
    static int place(int i) { return i / POSITIONS * 4 * POSITIONS + i % POSITIONS; }
    // Of so many positions: their vectors, four at a time. Words of others are zero, and what they multiply is any number.
    static int used(int positions) { return (positions + 4 * POSITIONS - 1) / (4 * POSITIONS) * 4; }

    void set(const float* weight, int count, const float* scale, const float* zero, Fetcher& next, int lines) {
        // Several of each, so that none waits for the one before it.
        V x[COUNT], tops[4], sums[4];
        for (int i = 0; i < 4; ++i) tops[i] = Simd::set1(1e-30f), sums[i] = Simd::zero();
        const bool whole = count == COUNT * W;
        const int vectors = used(count / GT);
        for (int i = 0; i < vectors; i += 4, scale += 4 * POSITIONS * GROUPS, zero += 4 * POSITIONS * GROUPS) {
            for (int j = 0; j < 4; ++j) {
                const V w = whole ? Simd::load(weight + (i + j) * W) : some_of(weight, (i + j) * W, count);
                x[i + j] = Simd::mul(w, of_positions<GT>(scale + j * POSITIONS * GROUPS));
                sums[j] = Simd::fma(w, of_positions<GT>(zero + j * POSITIONS * GROUPS), sums[j]);
                tops[j] = _mm512_range_ps(x[i + j], tops[j], LARGER_SIZE);
            }
            next.lines(4 * lines);
        }
        V top = Simd::larger(Simd::larger(tops[0], tops[1]), Simd::larger(tops[2], tops[3]));
        top = fold<GT>(top, [](V a, V b) { return Simd::larger(a, b); });
        Simd::store(step, Simd::mul(top, Simd::set1(1 / MOST)));
        const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        Simd::store(zeros, fold<GT>(sum, [](V a, V b) { return a + b; }));
        // Half of a byte more: then the upper byte is rounded, and the lower one less that half is the rest.
        const V by = _mm512_div_ps(Simd::set1(MOST), top), half = Simd::set1(128);
        const Codes sign = _mm512_set1_epi8(char(0x80));
        V high[GT] = {}, low[GT] = {};
        for (int i = 0; i < vectors / 4; ++i) {
            Codes n[4];
            for (int j = 0; j < 4; ++j) n[j] = _mm512_cvtps_epi32(Simd::fma(x[4 * i + j], by, half));
            const Codes a = _mm512_mask_blend_epi16(0xaaaaaaaa, n[0], _mm512_slli_epi32(n[1], 16));
            const Codes b = _mm512_mask_blend_epi16(0xaaaaaaaa, n[2], _mm512_slli_epi32(n[3], 16));
            const __mmask64 odd = 0xaaaaaaaaaaaaaaaa;
            high[i] = (V)_mm512_mask_blend_epi8(odd, _mm512_srli_epi16(a, 8), b);
            low[i] = (V)_mm512_xor_si512(_mm512_mask_blend_epi8(odd, a, _mm512_slli_epi16(b, 8)), sign);
        }
        turn_words<GT>(high, rows);
        turn_words<GT>(low, rows + GT);
    }
};

// Where a head is one chunk: that which is added up, that which is multiplied, and that which is prepared.
constexpr int HEADS_AT_ONCE = 3;

// What CodeSums works with; apart from it, as it is never set to zeros.
template <int GT>
struct CodeSpace {
    CodeWeights<GT> weights[HEADS_AT_ONCE][MOST_GROUPS];
    alignas(64) Codes columns[2][CODE_BLOCK], sums[2][4][2 * GT];
    alignas(64) char memory[CODE_BLOCK * MOST_GROUPS * CHUNK];
};

// Weighted sums of the values of a block's heads, chunk after chunk: while one is multiplied in tiles, the next is brought
// into their order, and what the one before came to is added up.
template <int GT>
struct CodeSums {
    const Call& c;
    int block;
    const char* data;
    const float *weight, *scale, *zero, *alpha;
    float* acc;  // of a query group's first head; heads are `stride` apart
    int64_t stride;
    Fetcher& next;
    CodeSpace<GT>& space;
    Rows rows{nullptr, 0, CODE_BLOCK, CODE_BLOCK, 0, nullptr};

    void run(int heads) {
        const int chunks = int(c.H / CHUNK), all = heads * chunks;
        for (int i = -1; i <= all; ++i) {
            if (i + 1 < all) prepare((i + 1) / chunks, (i + 1) % chunks, space.columns[(i + 1) % 2]);
            each_of<4>([&](auto quarter) {
                if (i >= 0 && i < all) multiply<quarter>(i / chunks, i % chunks, space.columns[i % 2], space.sums[i % 2][quarter]);
                if (i > 0) add(quarter, (i - 1) / chunks, (i - 1) % chunks, space.sums[(i - 1) % 2][quarter]);
            });
        }
    }

    const CodeWeights<GT>& weights_of(int head, int chunk) const {
        return space.weights[head % HEADS_AT_ONCE][chunk * CHUNK / c.group_size];
    }

    void prepare(int head, int chunk, Codes* to) {
        using Weights = CodeWeights<GT>;
        if (chunk == 0) {
            rows = Rows(data + head * c.H, c.kv_bytes.position, block, in_tiles(block), c.H, space.memory);
            const int lines = int((LINES_OF_WEIGHTS * c.group_size / CHUNK + Weights::COUNT - 1) / Weights::COUNT);
            for (int i = 0; i < c.groups; ++i)
                space.weights[head % HEADS_AT_ONCE][i].set(weight + head * block * GT, block * GT, scale + head * c.groups + i,
                                         zero + head * c.groups + i, next, lines);
        }
        const char* v = rows.data + chunk * CHUNK;
        const int64_t step = Weights::POSITIONS * rows.step;
#pragma GCC unroll 1
        for (int i = 0; i < Weights::used(block) * Weights::POSITIONS / 4; ++i) {
            interleave(v + Weights::place(i) * rows.step, 2 * step, step, 3 * step, to + 4 * i);
            next.lines(LINES_OF_COLUMNS * 4 / CODE_BLOCK);
        }
    }

    template <int QUARTER>
    void multiply(int head, int chunk, const Codes* from, Codes* to) {
        if (QUARTER == 0 && chunk * CHUNK % c.group_size == 0) tile_load<WEIGHTS>(weights_of(head, chunk).rows, 64);
        tile_zero<OUT + QUARTER>();
        tile_load<VALUES + QUARTER % 2>(from + QUARTER, 4 * CHUNK);
        tile_signed_unsigned<OUT + QUARTER, WEIGHTS, VALUES + QUARTER % 2>();
        tile_store<OUT + QUARTER>(to, 64);
    }

    void add(int quarter, int head, int chunk, const Codes* sum) {
        const CodeWeights<GT>& of = weights_of(head, chunk);
        float* to = acc + head * stride + (chunk * 4 + quarter) * GT * W;
        for (int g = 0; g < GT; ++g, to += W) {
            const Codes whole = _mm512_add_epi32(times_256(sum[g]), sum[GT + g]);
            add_codes(to, whole, alpha[head * GT + g], of.step[g], of.zeros[g]);
        }
        next.lines(LINES_OF_SUMS / 4);
    }
};

// As attend_codes.
template <int GT>
inline void attend_code_tiles(const Call& c, int heads, int block, int g0, const char* data, const float* bias,
                              const float* q, const float* scale, const float* zero, float* score, float* alpha,
                              const Partial& to, Fetcher& next) {
    const int64_t queries = c.N / c.K;
    const int chunks = int(c.H / CHUNK), vectors = CODE_BLOCK * GT / W;
    CodeSpace<GT> space;
    shape<Work::scores, 16>();
    for (int h = 0; h < heads; ++h) {
        const Rows keys(data + h * c.H, c.kv_bytes.position, block, in_tiles(block), c.H, space.memory);
        const float *packed = q + h * packed_codes(c) + group_count(g0) * chunks * PACKED, *s = scale + h * c.groups;
        const float* z = zero + h * c.groups;
        int chunk = 0;
        for (; chunk + 1 < chunks; chunk += 2)
            scores_code_tiles<GT, 2>(c, keys, block, packed, s, z, chunk, score + h * block * GT, next);
        if (chunk < chunks) scores_code_tiles<GT, 1>(c, keys, block, packed, s, z, chunk, score + h * block * GT, next);
    }
    weigh<GT>(heads, block, bias, score, to.m + g0 * heads, to.l + g0 * heads, alpha, next,
              (LINES_OF_WEIGHING * chunks + vectors - 1) / vectors);
    shape<Work::values, GT>();
    CodeSums<GT> sums{c, block, data + c.kv_bytes.half, score, scale + block * GROUPS, zero + block * GROUPS, alpha,
                      to.acc + g0 * c.H, queries * c.H, next, space};
    sums.run(heads);
}
