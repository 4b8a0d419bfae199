// Bank conflicts of shared memory and sectors of global memory, by instruction.
#include <algorithm>

#include "block.hpp"

namespace emulator {

// Wavefronts: lanes that go together, and of each of 32 banks as many words as differ. Accesses of
// 8 and 16 bytes go by halves and quarters of a warp.
void count_shared(Warp& warp, const Instruction& instruction, const u32* addresses, u32 bytes) {
    Launch& launch = *warp.block->launch;
    if (!launch.device->options.counters) return;
    Site& site = launch.site(instruction);
    const u32 together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    for (u32 first = 0; first < kLanes; first += together) {
        u32 words[32][32];
        u32 count[32] = {};
        u32 most = 0, lanes = 0;
        for (u32 lane = first; lane < first + together; ++lane) {
            if ((warp.mask >> lane & 1) == 0) continue;
            ++lanes;
            const u32 last = (addresses[lane] + bytes - 1) >> 2;
            for (u32 word = addresses[lane] >> 2; word <= last; ++word) {
                const u32 bank = word & 31;
                const u32* end = words[bank] + count[bank];
                if (std::find(words[bank], words[bank] + count[bank], word) != end) continue;
                words[bank][count[bank]++] = word;
                most = std::max(most, count[bank]);
            }
        }
        if (lanes == 0) continue;
        site.actual += most;
        site.ideal += 1;
        site.bytes += lanes * bytes;
    }
}

// Sectors of 32 bytes; the ideal is as few as hold the bytes, lanes that share them counted once.
void count_global(Warp& warp, const Instruction& instruction, const u64* addresses, u32 bytes) {
    Launch& launch = *warp.block->launch;
    if (!launch.device->options.counters) return;
    Site& site = launch.site(instruction);
    std::vector<u64> sectors, distinct;
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if ((warp.mask >> lane & 1) == 0) continue;
        distinct.push_back(addresses[lane]);
        const u64 last = (addresses[lane] + bytes - 1) >> 5;
        for (u64 sector = addresses[lane] >> 5; sector <= last; ++sector) sectors.push_back(sector);
    }
    const auto count = [](std::vector<u64>& values) {
        std::sort(values.begin(), values.end());
        return static_cast<u64>(std::unique(values.begin(), values.end()) - values.begin());
    };
    const u64 bytes_in_all = count(distinct) * bytes;
    site.actual += count(sectors);
    site.ideal += (bytes_in_all + 31) / 32;
    site.bytes += bytes_in_all;
}

}  // namespace emulator
