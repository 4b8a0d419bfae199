#include "warp.hpp"

#include <algorithm>

#include "block.hpp"

namespace emulator {

void Clocks::reset(size_t agents) {
    order.assign(agents, 0);
    visible.assign(agents, 0);
}

void Clocks::join(const Clocks& other) {
    for (size_t i = 0; i < order.size(); ++i) order[i] = std::max(order[i], other.order[i]);
    for (size_t i = 0; i < visible.size(); ++i) visible[i] = std::max(visible[i], other.visible[i]);
}

void Warp::begin(u32 lanes, u32 agents, u32 first_agent) {
    active = alive = lanes;
    next = 0;
    meet = kNowhere;
    splits.clear();
    state = kReady;
    copies.clear();
    products.clear();
    stores.clear();
    products_issued = 0;
    fenced = false;
    written_since_fence.assign(kernel->register_words / kLanes + 2, 0);
    cluster_arrivals = cluster_waits = 0;
    local.assign(size_t{kernel->local_bytes} * kLanes, 0xcd);
    clocks.reset(agents);
    agent = first_agent + index;
    if (agents != 0) clocks.order[agent] = 1;
}

// Lanes meet at the branch's immediate post-dominator. (Running the lowest instruction first is no
// alternative: LLVM may put the meeting point before the branch.)
void Warp::branch(u32 target, u32 meeting) {
    const u32 taken = mask;
    if (taken == active) {
        next = target;
        return;
    }
    if (meeting != meet) splits.push_back({meet, meeting, active});
    splits.push_back({meeting, next, active & ~taken});
    active = taken;
    next = target;
    meet = meeting;
}

void Warp::resume_split() {
    active = 0;
    while (active == 0 && !splits.empty()) {
        const Split top = splits.back();
        splits.pop_back();
        active = top.lanes & alive;
        next = top.at;
        meet = top.meet;
    }
}

void Warp::leave() {
    alive &= ~mask;
    active &= ~mask;
    if (active != 0) return;
    resume_split();
    if (active != 0) return;
    state = kDone;
    yields = true;
    block->leave();
}

void Warp::wait(State reason) {
    state = reason;
    yields = true;
    next -= 1;
}

}  // namespace emulator
