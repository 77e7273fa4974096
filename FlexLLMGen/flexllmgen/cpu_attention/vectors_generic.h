// Four floats by the compiler's own vectors, for any processor.
struct Simd {
    typedef float V __attribute__((vector_size(16)));
    static constexpr int W = 4;   // floats in a vector
    static constexpr int NR = 8;  // vectors that a tile keeps in registers

    static V zero() { return V{0, 0, 0, 0}; }
    static V set1(float x) { return V{x, x, x, x}; }
    static V load(const float* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
    static V fma(V a, V b, V c) { return a * b + c; }
    static V mul(V a, V b) { return a * b; }

    static void keep(V&) {}
    static V get(F32, const char* p) { return load((const float*)p); }
    static V get(F16, const char* p) {
        const uint16_t* x = (const uint16_t*)p;
        return V{from_half(x[0]), from_half(x[1]), from_half(x[2]), from_half(x[3])};
    }
    static V some_halves(const char* p, int count) {
        char all[2 * W] = {};
        std::memcpy(all, p, size_t(count) * 2);
        return get(F16{}, all);
    }
    static V get(BF16, const char* p) {
        const uint16_t* x = (const uint16_t*)p;
        return V{from_bfloat(x[0]), from_bfloat(x[1]), from_bfloat(x[2]), from_bfloat(x[3])};
    }
    static V get(U8, const char* p) {
        const uint8_t* x = (const uint8_t*)p;
        return V{float(x[0]), float(x[1]), float(x[2]), float(x[3])};
    }
    static void put(F32, char* p, V v) { store((float*)p, v); }
    static void put(F16, char* p, V v) {
        for (int i = 0; i < W; ++i) ((uint16_t*)p)[i] = to_half(v[i]);
    }
    static void put(BF16, char* p, V v) {
        for (int i = 0; i < W; ++i) ((uint16_t*)p)[i] = to_bfloat(v[i]);
    }

    static void sums(const V* a, float* out) {
        for (int i = 0; i < NR; ++i) out[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
    }

    static V larger(V a, V b) {
        for (int i = 0; i < W; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
        return a;
    }
    static bool any_gt(V a, V b) {
        bool any = false;
        for (int i = 0; i < W; ++i) any |= a[i] > b[i];
        return any;
    }
    static V where_gt(V a, V b, V x, V y) {
        for (int i = 0; i < W; ++i) y[i] = a[i] > b[i] ? x[i] : y[i];
        return y;
    }

    static V fraction(V x) {
        for (int i = 0; i < W; ++i) x[i] = x[i] >= LEAST_POWER ? x[i] - std::floor(x[i]) : 0;
        return x;
    }
    static V times_power(V y, V x) {
        for (int i = 0; i < W; ++i)
            y[i] = x[i] >= LEAST_POWER ? y[i] * of_bits(uint32_t(int(std::floor(x[i])) + 127) << 23) : 0;
        return y;
    }

    template <int STEP>
    static V turned(V x) {
        V y;
        for (int i = 0; i < W; ++i) y[i] = x[(i + STEP) % W];
        return y;
    }
    template <int N>
    static V repeat(const float* p) {
        V y;
        for (int i = 0; i < W; ++i) y[i] = p[i % N];
        return y;
    }
    template <int N>
    static void store_first(float* p, V v) {
        std::memcpy(p, &v, N * sizeof(float));
    }
};
