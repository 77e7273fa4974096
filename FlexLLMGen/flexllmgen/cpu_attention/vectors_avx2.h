// Eight floats in a register, by AVX2, FMA and F16C.
struct Simd {
    using V = __m256;
    static constexpr int W = 8;   // floats in a vector
    static constexpr int NR = 8;  // vectors that a tile keeps in registers

    static V zero() { return _mm256_setzero_ps(); }
    static V set1(float x) { return _mm256_set1_ps(x); }
    static V load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static V mul(V a, V b) { return _mm256_mul_ps(a, b); }

    static void keep(V&) {}
    static V get(F32, const char* p) { return _mm256_loadu_ps((const float*)p); }
    static V get(F16, const char* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static V some_halves(const char* p, int count) {
        char all[2 * W] = {};
        std::memcpy(all, p, size_t(count) * 2);
        return get(F16{}, all);
    }
    static V get(BF16, const char* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static V get(U8, const char* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
    static void put(F32, char* p, V v) { _mm256_storeu_ps((float*)p, v); }
    static void put(F16, char* p, V v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, 8)); }
    static void put(BF16, char* p, V v) {
        // To the nearest, ties to even.
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i high = _mm256_srli_epi32(sum, 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
        _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
    }

    // Sums of eight vectors, in order.
    static void sums(const V* a, float* out) {
        V b[4];
        for (int i = 0; i < 4; ++i) b[i] = _mm256_hadd_ps(a[2 * i], a[2 * i + 1]);
        const V c = _mm256_hadd_ps(b[0], b[1]), d = _mm256_hadd_ps(b[2], b[3]);
        store(out, _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31)));
    }

    static V larger(V a, V b) { return _mm256_max_ps(a, b); }
    static bool any_gt(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
    static V where_gt(V a, V b, V x, V y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }

    static V whole(V x) { return _mm256_floor_ps(_mm256_max_ps(x, set1(LEAST_POWER))); }
    static V fraction(V x) { return _mm256_sub_ps(_mm256_max_ps(x, set1(LEAST_POWER)), whole(x)); }
    static V times_power(V y, V x) {
        const __m256i n = _mm256_add_epi32(_mm256_cvtps_epi32(whole(x)), _mm256_set1_epi32(127));
        const V product = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(n, 23)));
        return _mm256_and_ps(_mm256_cmp_ps(x, set1(LEAST_POWER), _CMP_GE_OQ), product);
    }

    template <int STEP>
    static V turned(V x) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_permutevar8x32_ps(x, _mm256_add_epi32(lane, _mm256_set1_epi32(STEP)));
    }
    template <int N>
    static V repeat(const float* p) {
        if constexpr (N == 8) return load(p);
        if constexpr (N == 4) return _mm256_broadcast_ps((const __m128*)p);
        if constexpr (N == 2) return _mm256_castpd_ps(_mm256_broadcastsd_pd(_mm_castsi128_pd(_mm_loadl_epi64((const __m128i*)p))));
        if constexpr (N == 1) return set1(*p);
    }
    template <int N>
    static void store_first(float* p, V v) {
        if constexpr (N == 8) store(p, v);
        if constexpr (N == 4) _mm_storeu_ps(p, _mm256_castps256_ps128(v));
        if constexpr (N == 2) _mm_storel_pi((__m64*)p, _mm256_castps256_ps128(v));
        if constexpr (N == 1) *p = v[0];
    }
};
