// Tiles of codes of 8 bits with queries of 16, by the instruction that multiplies unsigned by signed bytes and adds up
// four products in 32 bits; included after tiles.h where it exists.
//
// Codes are never converted. A query's 64 numbers that meet one group become whole numbers n of 16 bits, n * step, and
// n = 256 * high + low in two signed bytes; so do a block's weights times the scale of their group. A group's scale and
// zero take part once for each sum. Sums lie as those of tiles.h, but each 64 numbers in the order in which interleaving
// four rows leaves them.

constexpr int CHUNK = 4 * W;              // codes in a vector
constexpr float MOST = 32639;             // 127 * 256 + 127
constexpr int MOST_GROUPS = 8;            // of a head
constexpr int PACKED = (CHUNK / 4 + 2) * W;  // floats of a chunk's packed queries

using Codes = __m512i;

inline bool by_codes(const Call& c) { return c.kv_type == 3 && c.q_type != 0 && c.H % CHUNK == 0 && c.H <= MOST_GROUPS * CHUNK; }
inline Codes load_codes(const void* p) { return _mm512_loadu_si512(p); }
inline Codes products(Codes sum, Codes codes, Codes bytes) {
    // Not the intrinsic: some compilers copy each sum before and after it.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(bytes));
    return sum;
}
inline Codes times_256(Codes x) { return _mm512_slli_epi32(x, 8); }
inline V largest(V x) { return Simd::set1(_mm512_reduce_max_ps(x)); }

// How many times in_groups calls for the first `queries`, and so where the packed queries of a call begin.
inline int group_count(int queries) { return queries / 8 + __builtin_popcount(unsigned(queries % 8)); }
inline int64_t packed_codes(const Call& c) { return group_count(int(c.N / c.K)) * (c.H / CHUNK) * PACKED; }

// Packed queries of a chunk: of one query its high bytes, its low ones, the step and the sum. Of more, [4 numbers]
// [8 queries' high, then low][4] bytes, then for each of these lanes the step, and the sum where it is counted.
template <class Q>
inline void pack_codes(Q type, const Call& c, const Piece& piece, float* q) {
    const int queries = int(c.N / c.K);
    const V factor = Simd::set1(c.factor * LOG2E);
    for (int h = 0; h < piece.heads; ++h) {
        in_groups(queries, [&](auto together, int g0) {
            constexpr int GT = decltype(together)::value;
            const int64_t first = piece.sequence * c.N + (int64_t(piece.head) + h) * queries + g0;
            float* to = q + h * packed_codes(c) + group_count(g0) * (c.H / CHUNK) * PACKED;
            for (int chunk = 0; chunk < c.H / CHUNK; ++chunk, to += PACKED) {
                if (GT > 1) std::fill_n(to, PACKED, 0.0f);
                for (int g = 0; g < GT; ++g) {
                    const char* from = c.q + ((first + g) * c.H + chunk * CHUNK) * Q::size;
                    V x[4], top = Simd::set1(1e-30f);
                    for (int i = 0; i < 4; ++i) {
                        x[i] = Simd::mul(factor, Simd::get(type, from + i * W * Q::size));
                        top = Simd::larger(_mm512_abs_ps(x[i]), top);
                    }
                    const float step = _mm512_reduce_max_ps(top) / MOST;
                    Codes sum = _mm512_setzero_si512();
                    alignas(16) int8_t high[CHUNK], low[CHUNK];
                    for (int i = 0; i < 4; ++i) {
                        const Codes n = _mm512_cvtps_epi32(Simd::mul(x[i], Simd::set1(1 / step)));
                        const Codes upper = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
                        _mm_store_si128((__m128i*)(high + i * W), _mm512_cvtepi32_epi8(upper));
                        _mm_store_si128((__m128i*)(low + i * W), _mm512_cvtepi32_epi8(n));
                        sum = _mm512_add_epi32(sum, n);
                    }
                    const float total = step * float(_mm512_reduce_add_epi32(sum));
                    if constexpr (GT == 1) {
                        std::memcpy(to, high, CHUNK);
                        std::memcpy(to + W, low, CHUNK);
                        to[2 * W] = step, to[2 * W + 1] = total;
                        continue;
                    }
                    for (int i = 0; i < CHUNK / 4; ++i) {
                        std::memcpy(to + i * W + g, high + 4 * i, 4);
                        std::memcpy(to + i * W + 8 + g, low + 4 * i, 4);
                    }
                    float* steps = to + CHUNK / 4 * W;
                    steps[g] = 256 * step, steps[8 + g] = step, steps[W + g] = total;
                }
            }
        });
    }
}

// Turns quarters of four vectors around: quarter i of vector j goes to quarter j of vector i.
inline void in_order(V& a, V& b, V& c, V& d) {
    const V w = _mm512_shuffle_f32x4(a, b, 0x44), x = _mm512_shuffle_f32x4(c, d, 0x44);
    const V y = _mm512_shuffle_f32x4(a, b, 0xee), z = _mm512_shuffle_f32x4(c, d, 0xee);
    a = _mm512_shuffle_f32x4(w, x, 0x88), b = _mm512_shuffle_f32x4(w, x, 0xdd);
    c = _mm512_shuffle_f32x4(y, z, 0x88), d = _mm512_shuffle_f32x4(y, z, 0xdd);
}

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
#ifdef AMX
    tile_zero<SUMS>();
    tile_load<QUERIES>(packed, 64);
    tile_load<KEYS>(k, step);
    tile_unsigned_signed<SUMS, KEYS, QUERIES>();
    return tile_store<SUMS>(sum, 64);
#endif
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
            next.lines(W);
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

// Whether the values of GT queries are added up by tiles, which want weights the other way around.
template <int GT>
constexpr bool IN_TILES = TILES && GT >= 4;

// From where in packed bytes those of [4 positions][GT][4] come, or of [GT][4 positions][4].
template <int GT>
struct Places {
    alignas(64) uint8_t at[CHUNK];
    Places() {
        for (int i = 0; i < CHUNK; ++i) {
            const int word = i / 4, four = IN_TILES<GT> ? word % (W / GT) : word / GT;
            const int from = (four * 4 + i % 4) * GT + (IN_TILES<GT> ? word / (W / GT) : word % GT);
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

    // The same for each query: over its lanes.
    template <class F>
    static V fold(V x, F&& f) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int step = GT; step < W; step *= 2)
            x = f(x, _mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(step)), x));
        return x;
    }

    void set(const float* weight, int block, const float* scale, const float* zero) {
        static const Places<GT> places;
        const __m512i position = _mm512_setr_epi32(0, 1 / GT, 2 / GT, 3 / GT, 4 / GT, 5 / GT, 6 / GT, 7 / GT, 8 / GT,
                                                   9 / GT, 10 / GT, 11 / GT, 12 / GT, 13 / GT, 14 / GT, 15 / GT);
        V x[(COUNT + 3) / 4 * 4], top = Simd::set1(1e-30f), sum = Simd::zero();
        for (V& each : x) each = Simd::zero();
        for (int i = 0; i < COUNT; ++i) {
            const int left = std::max(0, std::min(W, block * GT - i * W));
            const V w = _mm512_maskz_loadu_ps(__mmask16((1u << left) - 1), weight + i * W);
            const V s = _mm512_permutexvar_ps(position, Simd::load(scale + i * W / GT));
            const V z = _mm512_permutexvar_ps(position, Simd::load(zero + i * W / GT));
            x[i] = Simd::mul(w, s);
            top = Simd::larger(_mm512_abs_ps(x[i]), top);
            sum = Simd::fma(w, z, sum);
        }
        top = fold(top, [](V a, V b) { return Simd::larger(a, b); });
        Simd::store(step, Simd::mul(top, Simd::set1(1 / MOST)));
        Simd::store(zeros, fold(sum, [](V a, V b) { return _mm512_add_ps(a, b); }));
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

// Interleaves 64 codes of four rows: [column][4].
inline void interleave(const char* v, int64_t step, Codes* to) {
    const Codes x = load_codes(v), y = load_codes(v + step), z = load_codes(v + 2 * step), w = load_codes(v + 3 * step);
    const Codes a = _mm512_unpacklo_epi8(x, y), b = _mm512_unpackhi_epi8(x, y);
    const Codes c = _mm512_unpacklo_epi8(z, w), d = _mm512_unpackhi_epi8(z, w);
    to[0] = _mm512_unpacklo_epi16(a, c), to[1] = _mm512_unpackhi_epi16(a, c);
    to[2] = _mm512_unpacklo_epi16(b, d), to[3] = _mm512_unpackhi_epi16(b, d);
}

#ifdef AMX
// The weights' tile: a query's high bytes a row, and then the low ones; of eight, even queries before odd ones.
template <int GT>
inline void load_weights(const Weights<GT>& bytes) {
    const Codes first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const Codes second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    alignas(64) Codes rows[GT];
    for (int half = 0; half < 2; ++half) {
        const uint32_t* from = half ? bytes.low : bytes.high;
        Codes x[4];
        for (int i = 0; i < GT / 2; ++i) x[i] = load_codes(from + i * W);
        if (GT == 8) {
            const Codes a = _mm512_unpacklo_epi64(x[0], x[1]), b = _mm512_unpacklo_epi64(x[2], x[3]);
            const Codes c = _mm512_unpackhi_epi64(x[0], x[1]), d = _mm512_unpackhi_epi64(x[2], x[3]);
            x[0] = a, x[1] = b, x[2] = c, x[3] = d;
        }
        for (int i = 0; i < GT / 2; i += 2) {
            rows[half * GT / 2 + i] = _mm512_permutex2var_epi64(x[i], first, x[i + 1]);
            rows[half * GT / 2 + i + 1] = _mm512_permutex2var_epi64(x[i], second, x[i + 1]);
        }
    }
    tile_load<WEIGHTS>(rows, LONG_BLOCK);
}
#endif

// Adds weighted values of one head.
template <int GT>
inline void values_codes(const Call& c, const Rows& rows, int block, const float* weight, const float* alpha,
                         const float* scale, const float* zero, float* acc, Fetcher& next) {
    constexpr int CT = GT > 4 ? 16 / GT : 4, FOURS = LONG_BLOCK / 4;
    const int chunks = int(c.H / CHUNK), width = int(c.group_size / CHUNK);
    // Of all groups at once: none waits for another.
    Weights<GT> all[MOST_GROUPS];
    for (int i = 0; i < c.groups; ++i) all[i].set(weight, block, scale + i * LONG_BLOCK, zero + i * LONG_BLOCK);
    for (int chunk = 0; chunk < chunks; ++chunk, acc += 4 * GT * W) {
        const Weights<GT>& bytes = all[chunk / width];
        const char* v = rows.data + chunk * CHUNK;
        const auto add = [&](int i, int g, Codes sum) {
            float* to = acc + (i * GT + g) * W;
            const V before = Simd::fma(Simd::load(to), Simd::set1(alpha[g]), Simd::set1(bytes.zeros[g]));
            Simd::store(to, Simd::fma(_mm512_cvtepi32_ps(sum), Simd::set1(bytes.step[g]), before));
        };
        if constexpr (GT == 1) {
            Codes high[4], low[4];
            for (int i = 0; i < 4; ++i) high[i] = low[i] = _mm512_setzero_si512();
#pragma GCC unroll 1
            for (int four = 0; four < FOURS; ++four) {
                Codes x[4];
                interleave(v + 4 * four * rows.step, rows.step, x);
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
            interleave(v + 4 * four * rows.step, rows.step, x + 4 * four);
            next.lines(4);
        }
#ifdef AMX
        if constexpr (IN_TILES<GT>) {
            alignas(64) Codes sum[4][2 * GT];
            if (chunk % width == 0) load_weights(bytes);
            for (int i = 0; i < 4; ++i) {
                tile_zero<OUT>();
                tile_load<VALUES>(x + i, 4 * CHUNK);
                tile_signed_unsigned<OUT, WEIGHTS, VALUES>();
                tile_store<OUT>(sum[i], 64);
            }
            for (int i = 0; i < 4; ++i) {
                for (int g = 0; g < GT; ++g) {
                    const int row = GT == 8 ? g % 2 * 4 + g / 2 : g;
                    add(i, g, _mm512_add_epi32(times_256(sum[i][row]), sum[i][GT + row]));
                }
            }
            continue;
        }
#endif
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
                         Fetcher& values_now, Fetcher& keys_next) {
    const int64_t groups = c.groups * LONG_BLOCK, queries = c.N / c.K;
    alignas(64) char memory[LONG_BLOCK * MOST_GROUPS * CHUNK];
#ifdef AMX
    shape<1, GT>();
#endif
    for (int h = 0; h < heads; ++h) {
        const Rows keys(data + h * c.H, c.position_bytes, block, c.H, memory);
        const float* packed = q + h * packed_codes(c) + group_count(g0) * (c.H / CHUNK) * PACKED;
        scores_codes<GT>(c, keys, block, packed, scale + h * groups, zero + h * groups, h + 1 == heads,
                         score + h * block * GT, values_now);
    }
    weigh<GT>(heads, block, bias, score, to.m + g0 * heads, to.l + g0 * heads, alpha);
    scale += heads * groups, zero += heads * groups, data += c.half_bytes;
    for (int h = 0; h < heads; ++h) {
        const Rows values(data + h * c.H, c.position_bytes, block, c.H, memory);
        values_codes<GT>(c, values, block, score + h * block * GT, alpha + h * GT, scale + h * groups, zero + h * groups,
                         to.acc + (h * queries + g0) * c.H, keys_next);
    }
}
