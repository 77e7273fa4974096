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

    static V nearest(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static V larger(V a, V b) { return _mm256_max_ps(a, b); }
    static V times_power(V y, V n) {
        const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
    }
    static V where_ge(V x, V least, V y) { return _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_GE_OQ), y); }
};
