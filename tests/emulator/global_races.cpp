#include <algorithm>

#include "memory.hpp"

namespace emulator {

void GlobalRaces::add_launch(u32 clusters) {
    first_clusters_.push_back(first_clusters_.back() + clusters);
}

u32 GlobalRaces::launch_of(u32 owner) const {
    if (owner & kSpecial) return owner & ~(kSpecial | kAtomic);
    const auto after = std::upper_bound(first_clusters_.begin(), first_clusters_.end(), owner);
    return static_cast<u32>(after - first_clusters_.begin()) - 1;
}

GlobalRaces::Page& GlobalRaces::page(u64 number) {
    if (last_page_ != nullptr && last_number_ == number) return *last_page_;
    std::unique_ptr<Page>& slot = pages_[number];
    if (slot == nullptr) slot = std::make_unique<Page>();
    last_number_ = number;
    return *(last_page_ = slot.get());
}

// Visits the owners of the bytes, with the address and the number of bytes of each.
template <class Visit>
void GlobalRaces::each_owner(u64 address, u32 bytes, Visit visit) {
    const bool whole = address % 4 == 0 && bytes % 4 == 0;
    for (u64 at = address, end = address + bytes; at < end;) {
        Page& owners = page(at / kPageBytes);
        const u64 stop = std::min(end, (at / kPageBytes + 1) * kPageBytes);
        if (!whole && !owners.by_byte) {
            std::vector<Owner> each(kPageBytes);
            for (u32 i = 0; i < kPageBytes; ++i) each[i] = owners.owners[i / 4];
            owners.owners = std::move(each);
            owners.by_byte = true;
        }
        const u32 step = owners.by_byte ? 1 : 4;
        for (; at < stop; at += step) visit(owners.owners[at % kPageBytes / step], at, step);
    }
}

// Whether everything that the owner did is over, and its writes are visible.
bool GlobalRaces::ordered(const Accessor& accessor, u32 owner) const {
    if (owner == 0 || owner == accessor.cluster) return true;
    const u32 launch = launch_of(owner);
    if (launch > accessor.launch) return false;  // it began early, and did not wait
    if (launch < accessor.launch) return accessor.waited || launch < accessor.settled;
    if (owner & kSpecial) return !accessor.ordered->empty() && (owner & kAtomic);
    return accessor.ordered->count(owner) != 0;
}

void GlobalRaces::race(const Accessor& accessor, const char* verb, u32 owner,
                       const char* owner_verb, u64 address) const {
    const u32 launch = launch_of(owner);
    const std::string mine = accessor.kernels[accessor.launch];
    const std::string other = accessor.kernels[launch];
    const auto number = [](u32 index) { return " (launch " + text(index) + ")"; };
    std::string sentence = std::string("global memory: ") + verb + " of bytes that ";
    if (launch == accessor.launch) {
        sentence += owner & kAtomic    ? "another block changes by atomics"
                    : owner & kSpecial ? std::string("other blocks ") + owner_verb
                                       : std::string("another block ") + owner_verb;
        sentence += " in the same launch, in no order";
    } else if (launch < accessor.launch) {
        sentence += other + number(launch) + " " + owner_verb + ", before " + mine +
                    number(accessor.launch) + " has waited for it (griddepcontrol.wait)";
    } else {
        sentence += other + number(launch) + " " + owner_verb + " without waiting for " + mine +
                    number(accessor.launch) + " (griddepcontrol.wait)";
    }
    throw Fault(sentence, address);
}

void GlobalRaces::read(const Accessor& accessor, u64 address, u32 bytes) {
    each_owner(address, bytes, [&](Owner& owner, u64 at, u32) {
        if (!ordered(accessor, owner.writer)) race(accessor, "read", owner.writer, "writes", at);
        if (owner.reader == accessor.cluster) return;
        const bool several = owner.reader != 0 && !ordered(accessor, owner.reader);
        const u32 launch = std::max(accessor.launch, several ? launch_of(owner.reader) : 0);
        owner.reader = several ? kSpecial | launch : accessor.cluster;
    });
}

void GlobalRaces::write(const Accessor& accessor, u64 address, u32 bytes, const u8* data) {
    each_owner(address, bytes, [&](Owner& owner, u64 at, u32 step) {
        if (!ordered(accessor, owner.writer)) {
            const bool same =
                launch_of(owner.writer) == accessor.launch &&
                std::memcmp(reinterpret_cast<const void*>(at), data + (at - address), step) == 0;
            if (!same) race(accessor, "write", owner.writer, "writes", at);
        }
        if (!ordered(accessor, owner.reader)) race(accessor, "write", owner.reader, "reads", at);
        owner = {accessor.cluster, 0};
    });
}

void GlobalRaces::atomic(const Accessor& accessor, u64 address, u32 bytes) {
    const u32 clusters = first_clusters_[accessor.launch + 1] - first_clusters_[accessor.launch];
    const u32 mine = clusters == 1 ? accessor.cluster : kSpecial | kAtomic | accessor.launch;
    each_owner(address, bytes, [&](Owner& owner, u64 at, u32) {
        if (owner.writer != mine && !ordered(accessor, owner.writer))
            race(accessor, "atomic change", owner.writer, "writes", at);
        if (!ordered(accessor, owner.reader))
            race(accessor, "atomic change", owner.reader, "reads", at);
        owner = {mine, 0};
    });
}

}  // namespace emulator
