// Control: branches, ends, launches that overlap (PTX ISA 9.7.12, 9.7.13.13), hints.
#include "block.hpp"
#include "opcodes.hpp"

namespace emulator {
namespace {

void branch(Warp& warp, const Instruction& instruction) {
    warp.branch(instruction.target, instruction.meet);
}
void end(Warp& warp, const Instruction&) { warp.leave(); }
void trap(Warp&, const Instruction&) { throw Fault("trap"); }

// The next launch may start once every block has executed this or has ended.
void launch_dependents(Warp& warp, const Instruction&) {
    Block& block = *warp.block;
    if (block.triggered) return;
    block.triggered = true;
    Launch& launch = *block.launch;
    ++launch.triggered;
    launch.triggered_early |= !block.waited;
    if (launch.device->options.seed == 0) return;
    block.cluster->pauses = true;
    warp.yields = true;
}

void wait_for_launches(Warp& warp, const Instruction&) {
    Block& block = *warp.block;
    const Launch& launch = *block.launch;
    if (launch.index > launch.device->complete) {
        warp.wait(Warp::kAtLaunches);
        return;
    }
    block.waited = true;
    if (block.shadow.checks()) warp.clocks.order[block.cluster->agents.launches_before()] = 1;
}

// Registers move between warps; results do not change.
void set_max_registers(Warp& warp, const Instruction& instruction) {
    const i64 count = instruction.immediate;
    require(warp.mask == warp.alive, "setmaxnreg by a part of a warp");
    if (count < 24 || count > 256 || count % 8 != 0)
        throw Fault("setmaxnreg: " + std::to_string(count) +
                    " registers, wanted a multiple of 8 from 24 to 256");
}

}  // namespace

void add_branches(OpcodeTable& table) {
    table.add("bra", branch, "L", kBranch);
    table.add("bra.uni", branch, "L", kBranch);
    table.add("ret", end, "", kBranch);
    table.add("exit", end, "", kBranch);
    table.add("trap", trap, "", kOther);
    table.add("griddepcontrol.launch_dependents", launch_dependents, "", kOther);
    table.add("griddepcontrol.wait", wait_for_launches, "", kOther);
    table.add("setmaxnreg.inc.sync.aligned.u32", set_max_registers, "i", kOther);
    table.add("setmaxnreg.dec.sync.aligned.u32", set_max_registers, "i", kOther);
    table.add("nanosleep.u32", do_nothing, "r", kOther);
    table.add("prefetch.tensormap", do_nothing, "M", kOther);
    table.add("prefetch.param.tensormap", do_nothing, "M", kOther);
}

}  // namespace emulator
