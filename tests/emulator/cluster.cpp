// The start of a cluster, and its special registers.
#include <algorithm>

#include "block.hpp"

namespace emulator {

Cluster::Cluster(Launch& owner) : launch(&owner) {
    const Kernel& kernel = *owner.kernel;
    const u32 size = owner.cluster_size(), warps = owner.warps();
    agents.warps = warps;
    agents.blocks = size;
    blocks.resize(size);
    constexpr size_t kAlign = 16;  // words: a line of the host's cache
    const size_t each = (kernel.register_words + kAlign - 1) / kAlign * kAlign;
    registers_.resize(each * warps * size + kAlign);
    predicates_.resize(size_t{kernel.predicates} * warps * size + 1);
    u32* first = registers_.data();
    while (reinterpret_cast<uintptr_t>(first) % (4 * kAlign) != 0) ++first;
    for (u32 rank = 0; rank < size; ++rank) {
        Block& block = blocks[rank];
        block.cluster = this;
        block.launch = launch;
        block.rank = rank;
        block.shared_bytes = kernel.dynamic_shared + owner.shared_bytes;
        block.shared.resize(block.shared_bytes + 16);
        block.warps.resize(warps);
        for (u32 i = 0; i < warps; ++i) {
            Warp& warp = block.warps[i];
            warp.index = i;
            warp.kernel = &kernel;
            warp.registers = first + each * (rank * warps + i);
            warp.predicates = predicates_.data() + size_t{kernel.predicates} * (rank * warps + i);
        }
    }
}

void Cluster::begin(u32 cluster_index) {
    const Device& device = *launch->device;
    number = launch->first_cluster + cluster_index;
    random.state = device.options.seed + 0x632be59bd9b4e019ull * (number - 1);
    loads.clear();
    ordered.clear();
    acquired.clear();
    arrived = phase = turn_ = 0;
    pauses = false;
    arriving = complete = Clocks();
    priorities_.clear();
    const Constants& constants = launch->kernel->constants;
    for (Block& block : blocks) {
        block.begin(cluster_index * static_cast<u32>(blocks.size()) + block.rank);
        for (Warp& warp : block.warps) {
            for (const auto& [offset, value] : constants.words)
                std::fill_n(warp.words(offset), kLanes, value);
            for (const auto& [offset, value] : constants.doublewords)
                std::fill_n(warp.doublewords(offset), kLanes, value);
            for (const auto& [predicate, value] : constants.predicates)
                warp.predicates[predicate] = value;
            const u64 parameters = reinterpret_cast<u64>(launch->parameters);
            for (const auto& [offset, value] : constants.parameters)
                std::fill_n(warp.doublewords(offset), kLanes, parameters + value);
            set_special_registers(block, warp);
        }
    }
    ++launch->started;
}

static u32 special_value(const std::string& name, const Block& block, u32 warp, u32 lane) {
    const Launch& launch = *block.launch;
    const u32 thread = warp * kLanes + lane;
    const u32 size = launch.cluster_size(), width = launch.block[0], height = launch.block[1];
    const u32 axis = static_cast<u32>(name.back() - 'x');
    const std::string base = name.substr(0, name.find('.'));
    const u32 threads[] = {thread % width, thread / width % height, thread / width / height};
    if (base == "%tid") return threads[axis];
    if (base == "%ntid") return launch.block[axis];
    if (base == "%ctaid") return block.index[axis];
    if (base == "%nctaid") return launch.grid[axis];
    if (name == "%laneid") return lane;
    if (name == "%warpid") return warp;
    if (name == "%nsmid") return launch.device->options.multiprocessors;
    if (name == "%cluster_nctarank") return size;
    if (name == "%cluster_ctarank") return block.rank;
    if (base == "%cluster_nctaid") return axis == 0 ? size : 1;
    if (base == "%cluster_ctaid") return axis == 0 ? block.rank : 0;
    if (base == "%clusterid") return axis == 0 ? block.index[0] / size : block.index[axis];
    if (base == "%nclusterid") return axis == 0 ? launch.grid[0] / size : launch.grid[axis];
    if (name == "%lanemask_eq") return 1u << lane;
    if (name == "%lanemask_lt") return (1u << lane) - 1;
    if (name == "%lanemask_le") return (2u << lane) - 1;
    if (name == "%lanemask_gt") return ~((2u << lane) - 1);
    if (name == "%lanemask_ge") return ~((1u << lane) - 1);
    return 0;  // %smid, %envreg and clocks
}

void Cluster::set_special_registers(Block& block, Warp& warp) {
    for (const auto& [name, offset] : launch->kernel->constants.special)
        for (u32 lane = 0; lane < kLanes; ++lane)
            warp.words(offset)[lane] = special_value(name, block, warp.index, lane);
}

void Cluster::wake(Warp::State state) {
    for (Block& block : blocks)
        for (Warp& warp : block.warps)
            if (warp.state == state) warp.state = Warp::kReady;
}

}  // namespace emulator
