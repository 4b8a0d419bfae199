// SHA-256 (FIPS 180-4), by the processor's own instructions where it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace vitrail {

using Digest = std::array<uint8_t, 32>;

// Of bytes that are all there; `data` may be null where there are none.
Digest sha256(const void* data, size_t bytes);

namespace sha256_detail {  // what sha256 chooses between, for its test

using State = std::array<uint32_t, 8>;
void portable(State& state, const uint8_t* blocks, size_t count);
bool has_instructions();
void by_instructions(State& state, const uint8_t* blocks, size_t count);

}  // namespace sha256_detail

}  // namespace vitrail
