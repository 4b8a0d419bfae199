// SHA-256 (FIPS 180-4). Uses the processor's SHA instructions if it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace vitrail {

using Digest = std::array<uint8_t, 32>;

// `data` may be null if `bytes` is 0.
Digest sha256(const void* data, size_t bytes);

namespace sha256_detail {  // both implementations, for their test

using State = std::array<uint32_t, 8>;
void portable(State& state, const uint8_t* blocks, size_t count);
bool has_instructions();
void by_instructions(State& state, const uint8_t* blocks, size_t count);

}  // namespace sha256_detail

}  // namespace vitrail
