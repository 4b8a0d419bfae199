// wgmma (PTX ISA 9.7.15): products of a warpgroup, which are under way until they are waited for.
#include <algorithm>

#include "block.hpp"
#include "descriptor.hpp"
#include "opcodes.hpp"
#include "products.hpp"

namespace emulator {
namespace {

void read_operand(Warp& warp, u32 address, Access access) {
    warp.block->at(address, 16);
    warp.block->shadow.read(warp, address, 16, access);
}

// Reads of B by all warps of a warpgroup are checked once: the first warp notes the clocks that the
// others must have reached too.
void check_b(Warp& warp, const Product& product, const ProductForm& form, Access access) {
    Block& block = *warp.block;
    const auto key = std::make_pair(warp.index / 4, warp.products_issued);
    const auto [entry, is_first] = block.operand_checks.try_emplace(key);
    OperandCheck& check = entry->second;
    const bool same = !is_first && check.b == product.b;
    if (++check.warps == 4) {
        const bool known = same && Shadow::meets(warp.clocks, check.required);
        block.operand_checks.erase(entry);
        if (known) return;
    } else if (same && Shadow::meets(warp.clocks, check.required)) {
        return;
    }
    Shadow& shadow = block.shadow;
    if (is_first) {
        check.b = product.b;
        shadow.record(&check.required);
    }
    const Descriptor descriptor(product.b);
    const u32 depth = 16;
    if (form.transposes_b) {
        for (u32 k = 0; k < depth; ++k)
            for (u32 chunk = 0; chunk < form.columns / 8; ++chunk)
                read_operand(warp, descriptor.mn_major(chunk, k), access);
    } else {
        for (u32 column = 0; column < form.columns; ++column)
            for (u32 chunk = 0; chunk < 2; ++chunk)
                read_operand(warp, descriptor.k_major(column, chunk), access);
    }
    shadow.record(nullptr);
}

void check_a(Warp& warp, const Product& product, const ProductForm& form, Access access) {
    const Descriptor descriptor(product.a);
    const u32 first = warp.index % 4 * 16;  // row
    for (u32 chunk = 0; chunk < 2; ++chunk)
        for (u32 i = 0; i < 16; ++i) {
            const u32 address = form.transposes_a ? descriptor.mn_major(first / 8 + chunk, i)
                                                  : descriptor.k_major(first + i, chunk);
            read_operand(warp, address, access);
        }
}

// ptxas puts a fence (warpgroup.arrive) before such a product by itself, and says so: C7519.
void check_fence(Warp& warp, const Instruction& instruction, bool accumulates) {
    require(warp.fenced, "wgmma before any wgmma.fence");
    const auto written = [&](Registers registers) {
        for (u32 i = 0; i < registers.count; ++i)
            if (warp.written_since_fence[warp.kernel->pool[registers.first + i] / kLanes] != 0)
                return true;
        return false;
    };
    if (!(accumulates && written(instruction.vector)) && !written(instruction.second_vector))
        return;
    Launch& launch = *warp.block->launch;
    if (launch.device->options.strict)
        throw Fault("wgmma: a register was written after the latest wgmma.fence");
    ++launch.counters.injected_fences;
}

// D, A, B, scale-d, numbers. A's registers count as read at once: PTX forbids to write them before
// the wait, but Triton does, and ptxas guards them like any instruction's sources.
template <ProductType type>
void issue(Warp& warp, const Instruction& instruction) {
    require(warp.mask == kAllLanes, "wgmma by a part of a warp");
    Block& block = *warp.block;
    require(warp.index / 4 * 4 + 4 <= block.warps.size(), "wgmma by fewer than four warps");
    const ProductForm form(instruction, type == ProductType::kHalfSums);
    const u32 scale = warp.predicates[instruction.operand[2]];
    require(scale == 0 || scale == kAllLanes, "wgmma: lanes differ in scale-d");
    check_fence(warp, instruction, scale != 0);
    Product product{};
    product.multiply = product_function(type);
    product.instruction = &instruction;
    product.accumulates = scale != 0;
    product.b = warp.doublewords(instruction.operand[1])[0];
    if (form.a_in_registers) {
        require(instruction.second_vector.count == 4, "wgmma: A has another number of registers");
        for (u32 i = 0; i < 4; ++i) {
            const u32 offset = warp.kernel->pool[instruction.second_vector.first + i];
            std::memcpy(product.fragment[i], warp.words(offset), sizeof product.fragment[i]);
        }
    } else {
        product.a = warp.doublewords(instruction.operand[0])[0];
    }
    if (block.shadow.checks()) {
        const Access access{block.cluster->agents.products(block.rank, warp.index),
                            warp.products.commits + 1, true};
        check_b(warp, product, form, access);
        if (!form.a_in_registers) check_a(warp, product, form, access);
    }
    Counters& counters = block.launch->counters;
    ++counters.wgmma;
    const u32 depth = type < ProductType::kS8S8 ? 16 : 32;
    counters.wgmma_macs += u64{16} * depth * form.columns;
    ++warp.products_issued;
    warp.products.open.push_back(product);
}

void fence(Warp& warp, const Instruction&) {
    warp.fenced = true;
    std::fill(warp.written_since_fence.begin(), warp.written_since_fence.end(), 0);
}

// A product begins when all four warps have issued it, and is over for all at once. So a warp that
// waits for its group waits until the others have issued theirs, and then may tell other warps that
// the operands can be overwritten, for all four.
void commit(Warp& warp, const Instruction&) {
    warp.products.commit();
    Block& block = *warp.block;
    const u32 first = warp.index / 4 * 4;
    for (u32 i = first; i < first + 4 && i < block.warps.size(); ++i)
        if (block.warps[i].state == Warp::kAtWarpgroup) block.warps[i].state = Warp::kReady;
}

void run_group(Warp& warp) {
    for (Product& product : warp.products.committed.front()) product.compute(warp);
    warp.products.committed.pop_front();
}

void wait(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    const u32 first = warp.index / 4 * 4, keep = static_cast<u32>(instruction.immediate);
    const Clock commits = warp.products.commits, required = commits > keep ? commits - keep : 0;
    require(first + 4 <= block.warps.size(), "wgmma by fewer than four warps");
    for (u32 i = first; i < first + 4; ++i)
        if (block.warps[i].products.commits < required) {
            if (block.launch->device->options.counters) ++block.launch->site(instruction).waits;
            warp.wait(Warp::kAtWarpgroup);
            return;
        }
    for (u32 i = first; i < first + 4; ++i) {
        Warp& other = block.warps[i];
        while (!other.products.committed.empty() && other.products.finished() < required)
            run_group(other);
    }
    if (!block.shadow.checks()) return;
    Clock& clock = warp.clocks.order[block.cluster->agents.products(block.rank, warp.index)];
    clock = std::max(clock, required);
}

template <ProductType type>
void add(OpcodeTable& table, u32 columns, const std::string& types) {
    const bool integers = type >= ProductType::kS8S8;
    const std::string stem = "wgmma.mma_async.sync.aligned.m64n" + text(columns);
    table.add(stem + (integers ? "k32." : "k16.") + types, issue<type>,
              integers ? "v=ARp" : "v=ARpJ", kWgmma);
}

}  // namespace

// LLVM copies operands that are tied twice: ptxas gives both names one register,
// so the copy reads nothing; here the product is done early, and its sums have one more name. Any
// other use before the wait is a fault.
void use_accumulators(Warp& warp, const Instruction& instruction) {
    const Kernel& kernel = *warp.kernel;
    const u32 index = kernel.index_of(instruction);
    const auto copies = kernel.copies.find(index);
    const std::vector<u32> none;
    const std::vector<u32>& results = copies == kernel.copies.end() ? none : copies->second;
    std::vector<u32> read = kernel.accumulators.at(index);
    for (u32 result : results)
        read.erase(std::remove(read.begin(), read.end(), result), read.end());
    const auto touches = [&](const Product& product) {
        const auto first = kernel.pool.begin() + product.instruction->vector.first;
        const auto end = first + product.instruction->vector.count;
        return std::find_first_of(first, end, read.begin(), read.end()) != end ||
               std::find_first_of(product.copies.begin(), product.copies.end(), read.begin(),
                                  read.end()) != product.copies.end();
    };
    auto& groups = warp.products;
    if (std::any_of(groups.open.begin(), groups.open.end(), touches))
        throw Fault("a register of a wgmma is used that was not committed");
    bool any = false;
    for (auto& group : groups.committed)
        for (Product& product : group) {
            if (!touches(product)) continue;
            any = true;
            if (instruction.instruction_class != kMove)
                throw Fault("a register of a wgmma is used that was not waited for");
            product.copies.insert(product.copies.end(), results.begin(), results.end());
        }
    if (!any) return;
    ++warp.block->launch->counters.in_flight_moves;
    for (auto& group : groups.committed)
        for (Product& product : group) product.compute(warp);
}

void finish_products(Warp& warp, size_t keep) {
    while (warp.products.committed.size() > keep) run_group(warp);
}

void add_wgmma(OpcodeTable& table) {
    using T = ProductType;
    for (u32 columns = 8; columns <= 256; columns += 8) {
        add<T::kHalf>(table, columns, "f32.f16.f16");
        add<T::kBfloat>(table, columns, "f32.bf16.bf16");
        add<T::kHalfSums>(table, columns, "f16.f16.f16");
        if (columns > 24 && columns % 16 != 0) continue;  // integers have fewer widths
        add<T::kS8S8>(table, columns, "s32.s8.s8");
        add<T::kU8U8>(table, columns, "s32.u8.u8");
        add<T::kU8S8>(table, columns, "s32.u8.s8");
        add<T::kS8U8>(table, columns, "s32.s8.u8");
        add<T::kS8S8Saturated>(table, columns, "satfinite.s32.s8.s8");
        add<T::kU8U8Saturated>(table, columns, "satfinite.s32.u8.u8");
        add<T::kU8S8Saturated>(table, columns, "satfinite.s32.u8.s8");
        add<T::kS8U8Saturated>(table, columns, "satfinite.s32.s8.u8");
    }
    table.add("wgmma.fence.sync.aligned", fence, "", kWgmma);
    table.add("wgmma.commit_group.sync.aligned", commit, "", kWgmma);
    table.add("wgmma.wait_group.sync.aligned", wait, "i", kWgmma);
}

}  // namespace emulator
