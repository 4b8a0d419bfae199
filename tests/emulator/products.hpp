// The forms of wgmma, and the functions that compute them.
#pragma once

#include "warp.hpp"

namespace emulator {

enum class ProductType {
    kHalf,
    kBfloat,
    kHalfSums,
    kS8S8,
    kU8U8,
    kU8S8,
    kS8U8,
    kS8S8Saturated,
    kU8U8Saturated,
    kU8S8Saturated,
    kS8U8Saturated
};

// What an instruction says besides its operands.
struct ProductForm {
    u32 columns = 0;
    bool a_in_registers = false, transposes_a = false, transposes_b = false;
    bool negates = false;  // the product of the scales of A and B is -1

    // halves: sums of fp16. Throws Fault for a form that PTX does not have.
    ProductForm(const Instruction& instruction, bool halves);
};

void (*product_function(ProductType type))(Warp&, const Product&);

}  // namespace emulator
