#include "sha256.hpp"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace vitrail {

namespace {

constexpr size_t kBlock = 64;

constexpr sha256_detail::State kStart = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

alignas(16) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotated(uint32_t word, int bits) { return (word >> bits) | (word << (32 - bits)); }

}  // namespace

namespace sha256_detail {

void portable(State& state, const uint8_t* blocks, size_t count) {
    for (; count > 0; --count, blocks += kBlock) {
        uint32_t w[64];
        for (int i = 0; i < 16; ++i) {
            const uint8_t* at = blocks + 4 * i;
            w[i] = uint32_t{at[0]} << 24 | uint32_t{at[1]} << 16 | uint32_t{at[2]} << 8 | at[3];
        }
        for (int i = 16; i < 64; ++i) {
            const uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ (a >> 3)) + w[i - 7] +
                   (rotated(b, 17) ^ rotated(b, 19) ^ (b >> 10));
        }
        State s = state;
        for (int i = 0; i < 64; ++i) {
            const uint32_t mixed = rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25);
            const uint32_t chosen = (s[4] & s[5]) ^ (~s[4] & s[6]);
            const uint32_t t1 = s[7] + mixed + chosen + kRound[i] + w[i];
            const uint32_t rotations = rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22);
            const uint32_t majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
            s = {t1 + rotations + majority, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
        }
        for (size_t i = 0; i < s.size(); ++i) state[i] += s[i];
    }
}

#if defined(__x86_64__)

bool has_instructions() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_SSE4_1) == 0) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & bit_SHA) != 0;
}

// The instructions keep the state as ABEF and CDGH. Each pair of them does four rounds.
__attribute__((target("sha,sse4.1"))) void by_instructions(State& state, const uint8_t* blocks,
                                                           size_t count) {
    const auto words = [](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
        return _mm_set_epi32(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c),
                             static_cast<int>(d));
    };
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abef = words(state[0], state[1], state[4], state[5]);
    __m128i cdgh = words(state[2], state[3], state[6], state[7]);
    for (; count > 0; --count, blocks += kBlock) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];  // the sixteen words of the message that come next
        for (int i = 0; i < 16; ++i) {
            __m128i& now = w[i % 4];
            if (i < 4) {
                now = _mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks + 16 * i));
                now = _mm_shuffle_epi8(now, swap);
            } else {
                const __m128i& last = w[(i + 3) % 4];
                const __m128i middle = _mm_alignr_epi8(last, w[(i + 2) % 4], 4);
                now = _mm_add_epi32(_mm_sha256msg1_epu32(now, w[(i + 1) % 4]), middle);
                now = _mm_sha256msg2_epu32(now, last);
            }
            const auto* constants = reinterpret_cast<const __m128i*>(kRound + 4 * i);
            const __m128i sum = _mm_add_epi32(now, _mm_load_si128(constants));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    alignas(16) uint32_t low[4], high[4];  // F E B A and H G D C
    _mm_store_si128(reinterpret_cast<__m128i*>(low), abef);
    _mm_store_si128(reinterpret_cast<__m128i*>(high), cdgh);
    state = {low[3], low[2], high[3], high[2], low[1], low[0], high[1], high[0]};
}

#else

bool has_instructions() { return false; }
void by_instructions(State& state, const uint8_t* blocks, size_t count) {
    portable(state, blocks, count);
}

#endif

}  // namespace sha256_detail

Digest sha256(const void* data, size_t bytes) {
    static const auto add = sha256_detail::has_instructions() ? sha256_detail::by_instructions
                                                              : sha256_detail::portable;
    const auto* first = static_cast<const uint8_t*>(data);
    sha256_detail::State state = kStart;
    const size_t full = bytes / kBlock, tail = bytes % kBlock;
    add(state, first, full);
    // padding: a 1 bit, zeros, and the number of bits in the last eight bytes of a block
    uint8_t padded[2 * kBlock] = {};
    if (tail != 0) std::memcpy(padded, first + full * kBlock, tail);
    padded[tail] = 0x80;
    const size_t blocks = tail + 9 > kBlock ? 2 : 1;
    for (size_t i = 0; i < 8; ++i) {
        padded[blocks * kBlock - 1 - i] = static_cast<uint8_t>(uint64_t{bytes} * 8 >> (8 * i));
    }
    add(state, padded, blocks);
    Digest digest;
    for (size_t i = 0; i < digest.size(); ++i) {
        digest[i] = static_cast<uint8_t>(state[i / 4] >> (24 - 8 * (i % 4)));
    }
    return digest;
}

}  // namespace vitrail
