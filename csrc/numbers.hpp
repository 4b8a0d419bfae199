// An exported folder loads in every version of Vitrail that has the folder's two numbers.
// engine/vitrail/plan/record.py has the same two. CONTRIBUTING.md ("The two numbers") says when to
// raise them.
#pragma once

#include <cstdint>
#include <string>

namespace vitrail {

constexpr uint32_t kPlanGrammar = 4;  // the encoding and the meaning of records, plans and files
constexpr uint32_t kKernelAbi = 1;    // parameters, tensor maps and launch attributes of kernels

// The first bytes of a record: `kind` is "plan" or "kernel".
inline std::string magic(const std::string& kind) {
    return "vitrail " + kind + " " + std::to_string(kPlanGrammar) + "." +
           std::to_string(kKernelAbi) + "\n";
}

}  // namespace vitrail
