// Scores of codes of 8 bits with queries of 16, by the instruction that multiplies unsigned by signed bytes and adds up
// four products in 32 bits; included after tiles.h where it exists.
//
// Codes are never converted. A query's 64 numbers that meet one group become whole numbers n of 16 bits, n * step, and
// n = 256 * high + low in two signed bytes (code_values.h does so with weights). A group's scale and zero take part once
// for each sum. Sums of values lie as those of tiles.h, but each 64 numbers in the order in which interleaving four rows
// leaves them.

constexpr int CHUNK = 4 * W;              // codes in a vector
constexpr float MOST = 32639;             // 127 * 256 + 127
constexpr int MOST_GROUPS = 8;            // of a head
constexpr int PACKED = (CHUNK / 4 + 2) * W;  // floats of a chunk's packed queries

using Codes = __m512i;

// Of the 16 lines of a chunk of a tile's rows, those fetched with its scores; the others while weights are made of them.
constexpr int LINES_A_CHUNK = 10;

inline bool by_codes(const Call& c) { return c.kv_type == 3 && c.q_type != 0 && c.H % CHUNK == 0 && c.H <= MOST_GROUPS * CHUNK; }
inline Codes load_codes(const void* p) { return _mm512_loadu_si512(p); }
inline Codes products(Codes sum, Codes codes, Codes bytes) {
    // Not the intrinsic: some compilers copy each sum before and after it.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(bytes));
    return sum;
}
inline Codes times_256(Codes x) { return _mm512_slli_epi32(x, 8); }

// How many times in_groups calls for the first `queries`, and so where the packed queries of a call begin.
inline int group_count(int queries) { return queries / 8 + __builtin_popcount(unsigned(queries % 8)); }
inline int64_t packed_codes(const Call& c) { return group_count(int(c.N / c.K)) * (c.H / CHUNK) * PACKED; }

// Turns sixteen vectors around: x[i] lane j goes to x[j] lane i.
inline void turn(V* x) {
    V y[16];
    for (int i = 0; i < 16; i += 4) {
        const V a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
        const V c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
        y[i] = _mm512_shuffle_ps(a, c, 0x44), y[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        y[i + 2] = _mm512_shuffle_ps(b, d, 0x44), y[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        in_order(y[i], y[4 + i], y[8 + i], y[12 + i]);
        for (int j = 0; j < 4; ++j) x[4 * j + i] = y[4 * j + i];
    }
}

// Packed queries of a chunk: of one query its high bytes, its low ones, the step and the sum. Of more, [4 numbers]
// [8 queries' high, then low][4] bytes, then for each of these lanes the step, and the sum where it is counted. The step
// is one for all of a query.
template <class Q>
inline void pack_codes(Q type, const Call& c, const Piece& piece, float* q) {
    const int queries = int(c.N / c.K);
    for (int h = 0; h < piece.heads; ++h) {
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            const int64_t first = piece.sequence * c.N + (int64_t(piece.head) + h) * queries + g0;
            float* to = q + h * packed_codes(c) + group_count(g0) * (c.H / CHUNK) * PACKED;
            float step_of[GT];
            for (int g = 0; g < GT; ++g) {
                V top = Simd::zero();
                for (int column = 0; column < c.H; column += W)
                    top = Simd::larger(_mm512_abs_ps(Simd::get(type, c.q + ((first + g) * c.H + column) * Q::size)), top);
                step_of[g] = std::max(1e-30f, _mm512_reduce_max_ps(top) * c.factor * LOG2E) / MOST;
            }
            for (int chunk = 0; chunk < c.H / CHUNK; ++chunk, to += PACKED) {
                Codes bytes[16] = {};  // eight queries' high ones, then low ones
                if (GT > 1) std::fill_n(to + CHUNK / 4 * W, 2 * W, 0.0f);
                for (int g = 0; g < GT; ++g) {
                    const char* from = c.q + ((first + g) * c.H + chunk * CHUNK) * Q::size;
                    const float step = step_of[g];
                    const V by = Simd::set1(c.factor * LOG2E / step);
                    Codes sum = _mm512_setzero_si512();
                    __m128i *high = (__m128i*)(bytes + g), *low = (__m128i*)(bytes + 8 + g);
                    for (int i = 0; i < 4; ++i) {
                        const Codes n = _mm512_cvtps_epi32(Simd::mul(by, Simd::get(type, from + i * W * Q::size)));
                        const Codes upper = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
                        _mm_store_si128(high + i, _mm512_cvtepi32_epi8(upper));
                        _mm_store_si128(low + i, _mm512_cvtepi32_epi8(n));
                        sum = _mm512_add_epi32(sum, n);
                    }
                    const float total = step * float(_mm512_reduce_add_epi32(sum));
                    if constexpr (GT == 1) {
                        std::memcpy(to, high, CHUNK);
                        std::memcpy(to + W, low, CHUNK);
                        to[2 * W] = step, to[2 * W + 1] = total;
                        continue;
                    }
                    float* steps = to + CHUNK / 4 * W;
                    steps[g] = 256 * step, steps[8 + g] = step, steps[W + g] = total;
                }
                if (GT == 1) continue;
                turn((V*)bytes);
                std::memcpy(to, bytes, sizeof bytes);
            }
        });
    }
}

// Scales or zeros of a block as fp32, [group of the piece's heads][LONG_BLOCK]; past the block they are zero.
inline void turn_groups(const char* from, int64_t step, int groups, int block, float* to) {
    for (int p = 0; p < LONG_BLOCK; p += W) {
        for (int column = 0; column < groups; column += W) {
            const int count = std::min(W, groups - column);
            V x[W];
            for (int i = 0; i < W; ++i) {
                const char* row = from + (p + i) * step + column * 2;
                x[i] = p + i < block ? Simd::some_halves(row, count) : Simd::zero();
            }
            turn(x);
            for (int i = 0; i < count; ++i) Simd::store(to + (column + i) * LONG_BLOCK + p, x[i]);
        }
    }
}

// Sums of sixteen vectors, in order, as Simd::sums.
inline V sums_of(const Codes* a) {
    Codes b[8], c[4];
    for (int i = 0; i < 8; ++i)
        b[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
                                _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; ++i)
        c[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(b[2 * i], b[2 * i + 1]),
                                _mm512_unpackhi_epi64(b[2 * i], b[2 * i + 1]));
    const Codes d = _mm512_add_epi32(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xdd));
    const Codes e = _mm512_add_epi32(_mm512_shuffle_i32x4(c[2], c[3], 0x88), _mm512_shuffle_i32x4(c[2], c[3], 0xdd));
    return _mm512_cvtepi32_ps(
        _mm512_add_epi32(_mm512_shuffle_i32x4(d, e, 0x88), _mm512_shuffle_i32x4(d, e, 0xdd)));
}

// Products of sixteen rows' chunk with packed queries: a vector a row.
inline void key_products(const char* k, int64_t step, const float* packed, Codes* sum) {
    for (int r = 0; r < W; ++r) sum[r] = _mm512_setzero_si512();
    const char *k4 = k + 4 * step, *k8 = k + 8 * step, *k12 = k + 12 * step;
    for (int i = 0; i < CHUNK / 4; ++i, k += 4, k4 += 4, k8 += 4, k12 += 4) {
        const Codes bytes = load_codes(packed + i * W);
        const auto four = [](const char* from) {
            int x;
            std::memcpy(&x, from, 4);
            return _mm512_set1_epi32(x);
        };
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            sum[r] = products(sum[r], four(k + r * step), bytes);
            sum[4 + r] = products(sum[4 + r], four(k4 + r * step), bytes);
            sum[8 + r] = products(sum[8 + r], four(k8 + r * step), bytes);
            sum[12 + r] = products(sum[12 + r], four(k12 + r * step), bytes);
        }
    }
}

// Scores of one head's block, [position][GT]; `scale` and `zero` of its groups, [group][LONG_BLOCK]. Sixteen positions
// at a time, whatever is past the block's end.
template <int GT>
inline void scores_codes(const Call& c, const Rows& rows, int block, const float* q, const float* scale,
                         const float* zero, bool last, float* out, Fetcher& next) {
    const int chunks = int(c.H / CHUNK), width = int(c.group_size / CHUNK);
    for (int p = 0; p < block; p += W) {
        const char* k = rows.data + p * rows.step;
        V score[GT == 1 ? 1 : W];
        for (V& each : score) each = Simd::zero();
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const float *packed = q + chunk * PACKED, *steps = packed + CHUNK / 4 * W;
            const float *s = scale + chunk / width * LONG_BLOCK + p, *z = zero + chunk / width * LONG_BLOCK + p;
            Codes sum[W];
            if constexpr (GT == 1) {
                const Codes high = load_codes(packed), low = load_codes(packed + W);
#pragma GCC unroll 16
                for (int r = 0; r < W; ++r) {
                    const Codes x = load_codes(k + r * rows.step + chunk * CHUNK);
                    sum[r] = products(times_256(products(_mm512_setzero_si512(), x, high)), x, low);
                }
                const V by_scale = Simd::mul(Simd::load(s), Simd::set1(packed[2 * W]));
                score[0] = Simd::fma(sums_of(sum), by_scale, score[0]);
                score[0] = Simd::fma(Simd::load(z), Simd::set1(packed[2 * W + 1]), score[0]);
            } else {
                key_products(k + chunk * CHUNK, rows.step, packed, sum);
                const V by_step = Simd::load(steps), by_zero = Simd::load(steps + W);
#pragma GCC unroll 16
                for (int r = 0; r < W; ++r) {
                    const V by_scale = Simd::mul(by_step, Simd::set1(s[r]));
                    score[r] = Simd::fma(_mm512_cvtepi32_ps(sum[r]), by_scale, score[r]);
                    score[r] = Simd::fma(by_zero, Simd::set1(z[r]), score[r]);
                }
            }
            next.lines(GT > 1 ? LINES_A_CHUNK : W);
        }
        // Of keys soon to be read, from the second cache into the first.
        const char* soon = p + W < block ? k + W * rows.step : k + c.H - p * rows.step;
        for (int r = 0; r < W && (p + W < block || !last); ++r, soon += rows.step)
            for (int chunk = 0; chunk < chunks; ++chunk) __builtin_prefetch(soon + chunk * CHUNK, 0, 3);
        if constexpr (GT == 1) {
            Simd::store(out + p, score[0]);
        } else {
            // What is stored past a row's queries is overwritten by the next row.
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r)
                _mm256_storeu_ps(out + (p + r) * GT, _mm256_add_ps(_mm512_castps512_ps256(score[r]),
                                                                   _mm512_extractf32x8_ps(score[r], 1)));
        }
    }
}
