// Launches of one stream: in order, or overlapped as programmatic dependent launch allows.
#include <algorithm>
#include <chrono>
#include <list>
#include <memory>

#include "block.hpp"

namespace emulator {

void Launch::check() const {
    if (threads() == 0 || threads() > 1024)
        throw Fault("a block of " + text(threads()) + " threads, wanted 1 to 1024");
    for (int axis = 0; axis < 3; ++axis)
        if (kernel->required_block[0] != 0 && kernel->required_block[axis] != block[axis])
            throw Fault("a block of " + text(block[0]) + " x " + text(block[1]) + " x " +
                        text(block[2]) + " threads, the kernel requires " +
                        text(kernel->required_block[0]) + " x " + text(kernel->required_block[1]) +
                        " x " + text(kernel->required_block[2]));
    if (kernel->cluster[1] > 1 || kernel->cluster[2] > 1)
        throw Fault("clusters along y or z are not known to the emulator");
    if (grid[0] % cluster_size() != 0)
        throw Fault("a grid of " + text(grid[0]) + " blocks, wanted a multiple of the cluster's " +
                    text(cluster_size()));
}

namespace {

class Chain {
  public:
    Chain(std::vector<Launch>& launches, Device& device, u32& current)
        : launches_(launches), device_(device), current_(current), idle_(launches.size()) {
        random_.state = device.options.seed ^ 0x94d049bb133111ebull;
        resident_ = device.options.resident;
        if (resident_ == 0) resident_ = launches.size() > 1 && device.options.seed != 0 ? 4 : 1;
    }

    void run() {
        complete_empty_launches();
        while (device_.complete < launches_.size()) step();
    }

  private:
    using Clock_ = std::chrono::steady_clock;
    struct Resident {
        std::unique_ptr<Cluster> cluster;
        bool waits = false;
    };

    std::vector<Launch>& launches_;
    Device& device_;
    u32& current_;
    u32 resident_ = 1;
    Random random_{0};
    std::list<Resident> running_;
    std::vector<std::vector<std::unique_ptr<Cluster>>> idle_;  // by launch, to be used again

    // Whether a block of the launch may run now; sets what is complete before it if so.
    bool may_start(Launch& launch) const {
        if (launch.index == 0 || launch.index <= device_.complete) {
            if (launch.started == 0 && !launch.overlaps) launch.settled = launch.index;
        } else {
            const Launch& before = launches_[launch.index - 1];
            if (!launch.overlaps || before.triggered < before.blocks()) return false;
        }
        if (launch.started == 0 && launch.overlaps && launch.index > 0) {
            const Launch& before = launches_[launch.index - 1];
            const bool waited = !before.overlaps || !before.triggered_early;
            launch.settled = waited ? launch.index - 1 : before.settled;
        }
        return true;
    }

    // The next launch of which a cluster can start, or null.
    Launch* startable() const {
        for (u32 i = device_.complete; i < launches_.size(); ++i) {
            Launch& launch = launches_[i];
            if (!may_start(launch)) return nullptr;
            const auto own = [&](const Resident& item) { return item.cluster->launch == &launch; };
            const auto count = std::count_if(running_.begin(), running_.end(), own);
            if (launch.started < launch.clusters() && count < static_cast<long>(resident_))
                return &launch;
        }
        return nullptr;
    }

    void start(Launch& launch) {
        std::vector<std::unique_ptr<Cluster>>& idle = idle_[launch.index];
        if (idle.empty()) idle.push_back(std::make_unique<Cluster>(launch));
        running_.push_back({std::move(idle.back()), false});
        idle.pop_back();
        if (launch.index > device_.complete) launch.counters.overlapped = 1;
        running_.back().cluster->begin(launch.started);
    }

    void step() {
        std::vector<std::list<Resident>::iterator> able;
        for (auto item = running_.begin(); item != running_.end(); ++item)
            if (!item->waits) able.push_back(item);
        Launch* const next = startable();
        if (next != nullptr &&
            (able.empty() || (device_.options.seed != 0 && random_.below(2) == 0))) {
            current_ = next->index;
            start(*next);
            return;
        }
        if (able.empty()) throw Fault("deadlock: every block waits for launches before its own");
        const bool in_order = device_.options.seed == 0;
        const u32 index = in_order ? 0 : random_.below(static_cast<u32>(able.size()));
        advance(able[index], running_.size() == 1 && next == nullptr);
    }

    void advance(std::list<Resident>::iterator item, bool alone) {
        Launch& launch = *item->cluster->launch;
        current_ = launch.index;
        const auto begin = Clock_::now();
        const u32 turns = device_.options.seed == 0 || alone ? kNowhere : 1 + random_.below(50);
        const Cluster::Progress progress = item->cluster->advance(turns);
        launch.seconds += std::chrono::duration<double>(Clock_::now() - begin).count();
        item->waits = progress == Cluster::kWaitsForLaunches;
        if (progress != Cluster::kFinished) return;
        idle_[launch.index].push_back(std::move(item->cluster));
        running_.erase(item);
        ++launch.finished;
        complete_empty_launches();
    }

    // Counts launches that are complete, and lets blocks go on that waited for them.
    void complete_empty_launches() {
        u32& complete = device_.complete;
        while (complete < launches_.size() && launches_[complete].complete()) {
            idle_[complete].clear();
            ++complete;
        }
        // Also blocks of which some warps wait and others still run.
        for (Resident& item : running_)
            if (item.cluster->launch->index <= complete) {
                item.waits = false;
                item.cluster->wake(Warp::kAtLaunches);
            }
    }
};

}  // namespace

void run_chain(std::vector<Launch>& launches, Device& device, u32& current) {
    u32 first = 1;
    for (Launch& launch : launches) {
        current = launch.index;
        launch.check();
        launch.first_cluster = first;
        first += launch.clusters();
        device.races.add_launch(launch.clusters());
        device.kernels.push_back(launch.kernel->name);
        launch.counters.sites.resize(launch.kernel->code.size());
    }
    device.memory.prepare();
    current = 0;
    Chain(launches, device, current).run();
}

}  // namespace emulator
