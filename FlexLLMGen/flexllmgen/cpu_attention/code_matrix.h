// Tiles of codes of 8 bits with four or eight queries of 16, by AMX; included after code_values.h.
//
// A head's products are queued before the sums of the one before it are read: what a tile leaves in memory can be read
// only some time later, and what is loaded into one must have been there for some time.

// Products of one head's block with its queries, [chunk][position][8 queries' high bytes, then low ones].
inline void code_products(const Call& c, const Rows& rows, const float* q, Codes* to, Fetcher& next) {
    for (int chunk = 0; chunk < c.H / CHUNK; ++chunk, q += PACKED, to += LONG_BLOCK) {
        tile_load<QUERIES>(q, 64);
        each_of<BLOCK_TILES>([&](auto i) {
            tile_zero<SUMS + i>();
            tile_load<KEYS + i % 2>(rows.data + i * TILE_ROWS * rows.step + chunk * CHUNK, rows.step);
            tile_unsigned_signed<SUMS + i, KEYS + i % 2, QUERIES>();
            next.lines(TILE_ROWS);
        });
        each_of<BLOCK_TILES>([&](auto i) { tile_store<SUMS + i>(to + i * TILE_ROWS, 64); });
    }
}

// What N chunks' products come to, in `out` or added to it.
template <int GT, int N>
inline void add_products(const Codes* products, const float* q, const float* const* scale, const float* const* zero,
                         bool add, float* out) {
    V by_step[N], by_zero[N];
    for (int i = 0; i < N; ++i) {
        const float* steps = q + i * PACKED + CHUNK / 4 * W;
        by_step[i] = Simd::load(steps), by_zero[i] = Simd::load(steps + W);
    }
    for (int p = 0; p < LONG_BLOCK; ++p, out += GT) {
        V sum = Simd::mul(by_zero[0], Simd::set1(zero[0][p]));
        for (int i = 0; i < N; ++i) {
            const V product = Simd::mul(by_step[i], _mm512_cvtepi32_ps(products[i * LONG_BLOCK + p]));
            sum = Simd::fma(product, Simd::set1(scale[i][p]), sum);
            if (i) sum = Simd::fma(by_zero[i], Simd::set1(zero[i][p]), sum);
        }
        __m256 score = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
        if (add) score = _mm256_add_ps(score, _mm256_loadu_ps(out));
        if (GT == 8)
            _mm256_storeu_ps(out, score);
        else
            _mm_storeu_ps(out, _mm256_castps256_ps128(score));
    }
}

// Scores of one head's block, [position][GT], and of what follows it up to LONG_BLOCK.
template <int GT>
inline void scores_of_products(const Call& c, const Codes* products, const float* q, const float* scale, const float* zero,
                               float* out) {
    const int chunks = int(c.H / CHUNK), width = int(c.group_size / CHUNK);
    for (int chunk = 0; chunk < chunks; chunk += 2) {
        const float *scales[2], *zeros[2];
        for (int i = 0; i < 2; ++i) {
            const int group = (chunk + i) / width;
            scales[i] = scale + group * LONG_BLOCK, zeros[i] = zero + group * LONG_BLOCK;
        }
        const Codes* of_chunk = products + chunk * LONG_BLOCK;
        if (chunk + 1 < chunks)
            add_products<GT, 2>(of_chunk, q + chunk * PACKED, scales, zeros, chunk > 0, out);
        else
            add_products<GT, 1>(of_chunk, q + chunk * PACKED, scales, zeros, chunk > 0, out);
    }
}

// Turned weights' bytes as a first factor's rows, [GT][LONG_BLOCK].
template <int GT>
inline void turn_bytes(const uint32_t* from, Codes* to) {
    V x[GT];
    for (int i = 0; i < GT; ++i) x[i] = Simd::load((const float*)from + i * W);
    if constexpr (GT == 8) {
        // Quarters hold two queries' eight positions each.
        for (int i = 0; i < GT; i += 2) {
            const __m512d a = (__m512d)x[i], b = (__m512d)x[i + 1];
            x[i] = (V)_mm512_unpacklo_pd(a, b), x[i + 1] = (V)_mm512_unpackhi_pd(a, b);
        }
        in_order(x[0], x[2], x[4], x[6]);
        in_order(x[1], x[3], x[5], x[7]);
    } else {
        in_order(x[0], x[1], x[2], x[3]);
    }
    for (int i = 0; i < GT; ++i) _mm512_store_si512(to + i, (Codes)x[i]);
}

// One head's values on their way into its sums.
template <int GT>
struct CodeValues {
    Weights<GT, true> weights[MOST_GROUPS];
    alignas(64) Codes factor[MOST_GROUPS][2 * GT];          // queries' high bytes, then low ones
    alignas(64) Codes columns[MOST_GROUPS][LONG_BLOCK];     // [chunk][four positions][4 times W columns][4]

    void prepare(const Call& c, const Rows& rows, int block, const float* weight, const float* scale, const float* zero,
                 Fetcher& next) {
        for (int i = 0; i < c.groups; ++i) {
            weights[i].set(weight, block, scale + i * LONG_BLOCK, zero + i * LONG_BLOCK);
            turn_bytes<GT>(weights[i].high, factor[i]);
            turn_bytes<GT>(weights[i].low, factor[i] + GT);
        }
        for (int chunk = 0; chunk < c.H / CHUNK; ++chunk) {
#pragma GCC unroll 1
            for (int p = 0; p < LONG_BLOCK; p += 4) {
                interleave(rows.data + p * rows.step + chunk * CHUNK, rows.step, columns[chunk] + p);
                next.lines(4);
            }
        }
    }

    void add(const Call& c, const float* alpha, float* acc) const {
        const int chunks = int(c.H / CHUNK), width = int(c.group_size / CHUNK);
        alignas(64) Codes sums[MOST_GROUPS][4][2 * GT];
        for (int chunk = 0; chunk < chunks; ++chunk) {
            tile_load<WEIGHTS>(factor[chunk / width], 64);
            each_of<4>([&](auto i) {
                tile_zero<OUT + i>();
                tile_load<VALUES + i % 2>(columns[chunk] + i, 4 * CHUNK);
                tile_signed_unsigned<OUT + i, WEIGHTS, VALUES + i % 2>();
            });
            each_of<4>([&](auto i) { tile_store<OUT + i>(sums[chunk][i], 64); });
        }
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const Weights<GT, true>& of_group = weights[chunk / width];
            for (int i = 0; i < 4; ++i) {
                const Codes* sum = sums[chunk][i];
                for (int g = 0; g < GT; ++g, acc += W) {
                    const Codes whole = _mm512_add_epi32(times_256(sum[g]), sum[GT + g]);
                    const V before = Simd::fma(Simd::load(acc), Simd::set1(alpha[g]), Simd::set1(of_group.zeros[g]));
                    Simd::store(acc, Simd::fma(_mm512_cvtepi32_ps(whole), Simd::set1(of_group.step[g]), before));
                }
            }
        }
    }
};

// As attend_codes.
template <int GT>
inline void attend_code_matrix(const Call& c, int heads, int block, int g0, const char* data, const float* bias,
                               const float* q, const float* scale, const float* zero, float* score, float* alpha,
                               const Partial& to, Fetcher& values_now, Fetcher& keys_next) {
    const int64_t groups = c.groups * LONG_BLOCK, queries = c.N / c.K;
    alignas(64) char memory[LONG_BLOCK * MOST_GROUPS * CHUNK];
    alignas(64) Codes products[2][MOST_GROUPS * LONG_BLOCK];
    static thread_local CodeValues<GT> values[2];
    const auto packed = [&](int h) { return q + h * packed_codes(c) + group_count(g0) * (c.H / CHUNK) * PACKED; };
    shape<Work::code_scores, GT>();
    for (int h = 0; h <= heads; ++h) {
        if (h < heads) {
            const Rows keys(data + h * c.H, c.position_bytes, block, c.H, memory);
            code_products(c, keys, packed(h), products[h % 2], values_now);
        }
        if (h)
            scores_of_products<GT>(c, products[(h - 1) % 2], packed(h - 1), scale + (h - 1) * groups, zero + (h - 1) * groups,
                                   score + (h - 1) * block * GT);
    }
    weigh<GT>(heads, block, bias, score, to.m + g0 * heads, to.l + g0 * heads, alpha);
    scale += heads * groups, zero += heads * groups, data += c.half_bytes;
    shape<Work::values, GT>();
    for (int h = 0; h <= heads; ++h) {
        if (h < heads) {
            const Rows rows(data + h * c.H, c.position_bytes, block, c.H, memory);
            values[h % 2].prepare(c, rows, block, score + h * block * GT, scale + h * groups, zero + h * groups, keys_next);
        }
        if (h) values[(h - 1) % 2].add(c, alpha + (h - 1) * GT, to.acc + ((h - 1) * queries + g0) * c.H);
    }
}
