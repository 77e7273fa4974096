// The types that keys and values have in memory, and their conversion without special instructions.
#pragma once
#include <cstdint>
#include <cstring>

struct F32 {
    static constexpr int size = 4;
};
struct F16 {
    static constexpr int size = 2;
};
struct BF16 {
    static constexpr int size = 2;
};
struct U8 {  // codes: value = code * scale + zero
    static constexpr int size = 1;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float from_bfloat(uint16_t x) { return of_bits(uint32_t(x) << 16); }

inline uint16_t to_bfloat(float x) {
    const uint32_t bits = bits_of(x);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_half(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = (x >> 10) & 31, fraction = x & 0x3ff;
    if (exponent == 31) return of_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent) return of_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = float(fraction) * of_bits(103u << 23);  // steps of 2^-24
    return sign ? -small : small;
}

inline uint16_t to_half(float x) {
    const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (size < 0x38800000) {  // Adding 0.5 leaves steps of 2^-24 in the fraction, rounded.
        return uint16_t(sign | (bits_of(of_bits(size) + 0.5f) - bits_of(0.5f)));
    }
    return uint16_t(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
}
