// Sixteen floats in a register, by AVX-512.

struct Simd {
    using V = __m512;
    static constexpr int W = 16;   // floats in a vector
    static constexpr int NR = 16;  // vectors that a tile keeps in registers

    static V zero() { return _mm512_setzero_ps(); }
    static V set1(float x) { return _mm512_set1_ps(x); }
    static V load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V mul(V a, V b) { return _mm512_mul_ps(a, b); }

    static void keep(V& v) { asm("" : "+v"(v)); }  // in a register
    static V get(F32, const char* p) { return _mm512_loadu_ps(p); }
    static V get(F16, const char* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static V some_halves(const char* p, int count) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
    }
    static V get(BF16, const char* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static V get(U8, const char* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    static void put(F32, char* p, V v) { _mm512_storeu_ps(p, v); }
    static void put(F16, char* p, V v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 8)); }
    static void put(BF16, char* p, V v) {
        // To the nearest, ties to even.
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }

    // Sums of sixteen vectors, in order: halves are added while pairs are interleaved.
    static void sums(const V* a, float* out) {
        V b[8], c[4];
        for (int i = 0; i < 8; ++i)
            b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                                 _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
        for (int i = 0; i < 4; ++i) {
            const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
            c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        }
        const V d = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
        const V e = _mm512_add_ps(_mm512_shuffle_f32x4(c[2], c[3], 0x88), _mm512_shuffle_f32x4(c[2], c[3], 0xdd));
        store(out, _mm512_add_ps(_mm512_shuffle_f32x4(d, e, 0x88), _mm512_shuffle_f32x4(d, e, 0xdd)));
    }

    static V larger(V a, V b) { return _mm512_max_ps(a, b); }
    static bool any_gt(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static V where_gt(V a, V b, V x, V y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x); }

    static V fraction(V x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
    static V times_power(V y, V x) {
        return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(LEAST_POWER), _CMP_GE_OQ), y, x);
    }

    template <int STEP>
    static V turned(V x) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(STEP)), x);
    }
    template <int N>
    static V repeat(const float* p) {
        if constexpr (N == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
        if constexpr (N == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
        if constexpr (N == 2) return _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_castsi128_pd(_mm_loadl_epi64((const __m128i*)p))));
        if constexpr (N == 1) return set1(*p);
    }
    template <int N>
    static void store_first(float* p, V v) {
        _mm512_mask_storeu_ps(p, __mmask16((1u << N) - 1), v);
    }
};
