// After a kernel has been read: labels, instructions at which lanes meet again, wgmma's registers.
#include <algorithm>

#include "parser.hpp"

namespace emulator {

namespace {

// Basic blocks, with an exit after the last.
struct FlowGraph {
    std::vector<u32> start;  // first instruction of each block
    std::vector<u32> block_of;  // by instruction
    std::vector<std::vector<u32>> next, before;

    FlowGraph(const Kernel& kernel, Handler branch, Handler end);
    u32 exit() const { return static_cast<u32>(start.size()); }
};

FlowGraph::FlowGraph(const Kernel& kernel, Handler branch, Handler end) {
    const auto& code = kernel.code;
    const u32 size = static_cast<u32>(code.size());
    const auto ends_block = [&](u32 i) { return code[i].run == branch || code[i].run == end; };
    std::vector<bool> leads(size + 1, false);
    leads[0] = true;
    for (u32 i = 0; i < size; ++i) {
        if (code[i].run == branch) leads[code[i].target] = true;
        if (ends_block(i)) leads[i + 1] = true;
    }
    for (u32 i = 0; i < size; ++i) {
        if (leads[i]) start.push_back(i);
        block_of.push_back(static_cast<u32>(start.size()) - 1);
    }
    next.resize(start.size() + 1);
    before.resize(start.size() + 1);
    for (u32 block = 0; block < exit(); ++block) {
        const u32 last = (block + 1 < exit() ? start[block + 1] : size) - 1;
        const Instruction& instruction = code[last];
        const u32 after = block + 1;  // the exit's number follows the last block's
        if (instruction.run == branch) next[block].push_back(block_of[instruction.target]);
        if (instruction.run == end) next[block].push_back(exit());
        if (!ends_block(last) || instruction.guard >= 0) next[block].push_back(after);
        for (u32 target : next[block]) before[target].push_back(block);
    }
}

// Immediate post-dominators by the algorithm of Cooper, Harvey and Kennedy on the reversed graph.
std::vector<u32> post_dominators(const FlowGraph& graph) {
    const u32 exit = graph.exit();
    std::vector<u32> order, number(exit + 1, kNowhere), dominator(exit + 1, kNowhere);
    std::vector<std::pair<u32, u32>> stack{{exit, 0}};
    std::vector<bool> seen(exit + 1, false);
    seen[exit] = true;
    while (!stack.empty()) {
        const auto [block, index] = stack.back();
        if (index < graph.before[block].size()) {
            ++stack.back().second;
            const u32 target = graph.before[block][index];
            if (!seen[target]) stack.push_back({target, 0});
            seen[target] = true;
        } else {
            number[block] = static_cast<u32>(order.size());
            order.push_back(block);
            stack.pop_back();
        }
    }
    dominator[exit] = exit;
    for (bool changed = true; changed;) {
        changed = false;
        for (auto block = order.rbegin(); block != order.rend(); ++block) {
            if (*block == exit) continue;
            u32 common = kNowhere;
            for (u32 target : graph.next[*block]) {
                if (dominator[target] == kNowhere) continue;
                if (common == kNowhere) {
                    common = target;
                    continue;
                }
                u32 other = target;
                while (other != common) {
                    while (number[other] < number[common]) other = dominator[other];
                    while (number[common] < number[other]) common = dominator[common];
                }
            }
            changed |= common != dominator[*block];
            dominator[*block] = common;
        }
    }
    return dominator;
}

}  // namespace

void set_meeting_points(Kernel& kernel) {
    const Handler branch = opcode_table().find("bra")->run, end = opcode_table().find("ret")->run;
    const FlowGraph graph(kernel, branch, end);
    const std::vector<u32> dominator = post_dominators(graph);
    for (size_t i = 0; i < kernel.code.size(); ++i) {
        Instruction& instruction = kernel.code[i];
        if (instruction.run != branch) continue;
        const u32 block = dominator[graph.block_of[i]];
        instruction.meet = block >= graph.exit() ? kNowhere : graph.start[block];
    }
}

void Parser::resolve_labels() {
    for (const Jump& jump : jumps_) {
        const u32* target = nullptr;
        for (int i = jump.scope; i >= 0 && target == nullptr;) {
            const Scope& scope = scopes_[static_cast<size_t>(i)];
            const auto label = scope.labels.find(jump.label);
            if (label != scope.labels.end()) target = &label->second;
            i = scope.parent;
        }
        line_ = kernel_->code[jump.instruction].line;
        if (target == nullptr) fail("a label that is not known: '" + jump.label + "'");
        kernel_->code[jump.instruction].target = *target;
    }
}

// Marks what registers of `marks` are copied to, from register to register.
void Parser::mark_copies(Kernel& kernel, std::vector<bool>& marks) const {
    for (bool more = true; more;) {
        more = false;
        for (const auto& [index, results] : writes_) {
            if (kernel.code[index].instruction_class != kMove) continue;
            bool copies = false;
            for (u32 offset : uses_.at(index))
                copies |= marks[offset / kLanes] &&
                          std::find(results.begin(), results.end(), offset) == results.end();
            if (!copies) continue;
            kernel.copies[index] = results;
            for (u32 offset : results) {
                more |= !marks[offset / kLanes];
                marks[offset / kLanes] = true;
            }
        }
    }
}

// Which instructions use registers that wgmma accumulates in, and which write its operands.
void Parser::note_product_registers() {
    Kernel& kernel = *kernel_;
    std::vector<bool> accumulates(kernel.register_words / kLanes + 2, false);
    const auto is_product = [&](const Instruction& instruction) {
        return kernel.opcodes[instruction.opcode].rfind("wgmma.mma_async", 0) == 0;
    };
    const auto mark = [&](std::vector<bool>& marks, Registers registers) {
        for (u32 i = 0; i < registers.count; ++i)
            marks[kernel.pool[registers.first + i] / kLanes] = true;
    };
    for (const Instruction& instruction : kernel.code)
        if (is_product(instruction)) mark(accumulates, instruction.vector);
    mark_copies(kernel, accumulates);
    std::vector<bool> takes_part = accumulates;
    for (const Instruction& instruction : kernel.code)
        if (is_product(instruction)) mark(takes_part, instruction.second_vector);
    const auto note = [&](const RegisterUses& all, const std::vector<bool>& marks,
                          RegisterUses& noted, bool Instruction::* flag) {
        for (const auto& [index, offsets] : all) {
            if (is_product(kernel.code[index])) continue;
            for (u32 offset : offsets) {
                if (!marks[offset / kLanes]) continue;
                kernel.code[index].*flag = true;
                noted[index].push_back(offset);
            }
        }
    };
    note(uses_, accumulates, kernel.accumulators, &Instruction::uses_accumulator);
    note(writes_, takes_part, kernel.fragments, &Instruction::writes_fragment);
}

void Parser::finish() {
    lay_out_shared();
    Instruction end;  // for kernels whose text does not end with ret
    end.run = opcode_table().find("ret")->run;
    end.instruction_class = kBranch;
    end.line = line_;
    end.opcode = static_cast<u32>(kernel_->opcodes.size());
    kernel_->opcodes.push_back("the end");
    kernel_->code.push_back(end);
    resolve_labels();
    set_meeting_points(*kernel_);
    note_product_registers();
    kernel_->sources = source_.sources();
    kernel_->parameter_bytes = (kernel_->parameter_bytes + 7) / 8 * 8;
}

std::string Kernel::location(u32 index) const {
    if (index >= code.size()) return "past the end";
    const Instruction& instruction = code[index];
    const std::string& source = sources[instruction.source];
    return opcodes[instruction.opcode] + ", PTX line " + std::to_string(instruction.line) +
           (source.empty() ? "" : ", " + source);
}

}  // namespace emulator
