// What the processor and the system allow: the best level of library.py. A library of its own, built and asked first.

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

// Whether there is AMX for bf16 and bytes, and the system lets this process use it: Linux wants to be asked.
static bool amx_allowed() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, bytes
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return false;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

// 4 avx512 with AMX and the system's leave, 3 avx512 with products of bf16 and bytes, 2 avx512, 1 avx2, 0 neither.
extern "C" int flex_best_level() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 1;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni") ||
        !__builtin_cpu_supports("avx512vbmi"))
        return 2;
    return amx_allowed() ? 4 : 3;
#else
    return 0;
#endif
}
