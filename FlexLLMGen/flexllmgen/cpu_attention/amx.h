// Tiles of AMX: eight registers of up to sixteen rows of 64 bytes, and their products. With FLEX_EMULATE_AMX plain
// loops stand for them, so that what uses them can be tested on any processor; they end the process where it would.

// Shapes, as the processor reads them.
struct Tiles {
    uint8_t palette, start, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

#ifdef FLEX_EMULATE_AMX

struct Tile {
    alignas(64) char at[16][64];
};
inline thread_local Tiles tiles_now;
inline thread_local Tile tile[8];

inline void must(bool right) {
    if (!right) __builtin_trap();
}
inline void configure(const Tiles& shapes) {
    must(shapes.palette == 1);
    for (int i = 0; i < 16; ++i) {
        must(i < 8 ? shapes.rows[i] <= 16 && shapes.row_bytes[i] <= 64 : !shapes.rows[i] && !shapes.row_bytes[i]);
        must(!shapes.rows[i] == !shapes.row_bytes[i]);
    }
    tiles_now = shapes;
}
inline void release() { tiles_now = Tiles{}; }
template <int T>
inline void tile_zero() {
    must(tiles_now.rows[T]);
    std::memset(&tile[T], 0, sizeof tile[T]);
}
template <int T>
inline void tile_load(const void* from, int64_t step) {
    tile_zero<T>();
    for (int r = 0; r < tiles_now.rows[T]; ++r)
        std::memcpy(tile[T].at[r], (const char*)from + r * step, tiles_now.row_bytes[T]);
}
template <int T>
inline void tile_store(void* to, int64_t step) {
    must(tiles_now.rows[T]);
    for (int r = 0; r < tiles_now.rows[T]; ++r)
        std::memcpy((char*)to + r * step, tile[T].at[r], tiles_now.row_bytes[T]);
}
// C[r][n] += sum of A[r][k] * B[k / per][n][k % per].
template <class Sum, class F>
inline void tile_products(int c, int a, int b, int per, F&& product) {
    const Tiles& t = tiles_now;
    must(t.rows[c] && t.rows[a] && t.rows[b] && c != a && c != b && a != b);
    must(t.rows[c] == t.rows[a] && t.row_bytes[c] == t.row_bytes[b]);
    must(t.row_bytes[a] == 4 * t.rows[b] && t.row_bytes[c] % 4 == 0);
    for (int r = 0; r < tiles_now.rows[c]; ++r)
        for (int n = 0; n < tiles_now.row_bytes[c] / 4; ++n)
            for (int k = 0; k < tiles_now.row_bytes[a] / 4; ++k)
                for (int i = 0; i < per; ++i)
                    ((Sum*)tile[c].at[r])[n] += product(tile[a].at[r] + 4 * k, tile[b].at[k] + 4 * n, i);
}
template <int C, int A, int B>
inline void tile_bfloats() {
    tile_products<float>(C, A, B, 2, [](const char* a, const char* b, int i) {
        return from_bfloat(((const uint16_t*)a)[i]) * from_bfloat(((const uint16_t*)b)[i]);
    });
}
template <int C, int A, int B>
inline void tile_unsigned_signed() {
    tile_products<int>(C, A, B, 4, [](const char* a, const char* b, int i) {
        return int(((const uint8_t*)a)[i]) * int(((const int8_t*)b)[i]);
    });
}
template <int C, int A, int B>
inline void tile_signed_unsigned() {
    tile_products<int>(C, A, B, 4, [](const char* a, const char* b, int i) {
        return int(((const int8_t*)a)[i]) * int(((const uint8_t*)b)[i]);
    });
}

#else

// By the assembler's names: compilers' own functions want literal numbers, and some forget that memory is read.
inline void configure(const Tiles& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
inline void release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, int64_t step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_bfloats() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void tile_unsigned_signed() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void tile_signed_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif
