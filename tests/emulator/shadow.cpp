#include "shadow.hpp"

#include <algorithm>

namespace emulator {

std::string Agents::name(u32 agent, u32 own_rank) const {
    const u32 rank = agent / stride(), local = agent % stride();
    std::string result;
    if (local < warps)
        result = "warp " + text(local);
    else if (local < 2 * warps)
        result = "cp.async of warp " + text(local - warps);
    else if (local < 3 * warps)
        result = "wgmma of warpgroup " + text(local - 2 * warps);
    else if (local < 4 * warps)
        result = "a bulk store of warp " + text(local - 3 * warps);
    else
        result = "a bulk load";
    return rank == own_rank ? result : result + " of block " + text(rank) + " of the cluster";
}

void Shadow::begin(const Agents* agents, u32 rank, u32 bytes) {
    agents_ = agents;
    rank_ = rank;
    same_writes = 0;
    if (agents == nullptr) return;
    words_.assign(bytes / 4 + 1, Word());
    readers_.assign(1, {});
    required_ = nullptr;
}

void Shadow::race(const char* message, u32 word, u32 agent, const Word& state) const {
    std::string sentence = std::string(message) + " at byte " +
                           std::to_string(i64{word} * 4 - i64{kReservedShared}) +
                           " of shared memory, by " + agents_->name(agent, rank_);
    if (state.writer != kNone)
        sentence += "; last written by " + agents_->name(state.writer, rank_);
    if (state.reader == kSeveral)
        sentence += "; read by several";
    else if (state.reader != kNone)
        sentence += "; read by " + agents_->name(state.reader, rank_);
    throw Fault(sentence);
}

// Bytes of a word that an access covers, as a mask.
static u32 bytes_of(u32 word, u32 address, u32 bytes) {
    const u32 from = address > word * 4 ? address - word * 4 : 0;
    const u32 to = std::min(address + bytes - word * 4, 4u);
    return (1u << to) - (1u << from);
}

void Shadow::check_readers(const Clocks& clocks, u32 index, u32 mask, Access access) {
    Word& word = words_[index];
    const bool is_warp = agents_->is_warp(access.agent);
    if (word.reader == kSeveral) {
        auto& readers = readers_[word.several];
        for (const auto& [reader, clock] : readers) {
            if (clock <= clocks.order[reader] || (reader == access.agent && is_warp)) continue;
            Word state = word;
            state.reader = static_cast<u16>(reader);
            race("write after read", index, access.agent, state);
        }
        if ((word.read_mask & ~mask) == 0) readers.clear();
    } else if (word.read_clock > clocks.order[word.reader] &&
               !(word.reader == access.agent && is_warp)) {
        race("write after read", index, access.agent, word);
    }
    word.read_mask &= ~mask & 15u;
    if (word.read_mask == 0) word.reader = kNone;
}

void Shadow::write(const Warp& warp, u32 address, u32 bytes, Access access, const u8* memory,
                   const u8* data) {
    const Clocks& clocks = warp.clocks;
    for (u32 i = address / 4, end = (address + bytes + 3) / 4; i < end; ++i) {
        Word& word = words_[i];
        const u32 mask = bytes_of(i, address, bytes);
        if (word.writer != kNone && (word.write_mask & mask) != 0 &&
            word.write_clock > clocks.order[word.writer] &&
            !(word.writer == access.agent && agents_->is_warp(access.agent))) {
            const u32 from = std::max(i * 4, address), to = std::min(i * 4 + 4, address + bytes);
            const bool same = data != nullptr && agents_->is_warp(word.writer) &&
                              std::memcmp(memory + from, data + (from - address), to - from) == 0;
            if (!same) race("write after write", i, access.agent, word);
            ++same_writes;
            continue;
        }
        if (access.async && word.writer != kNone && agents_->is_generic(word.writer) &&
            (word.write_mask & mask) != 0 && word.write_clock > clocks.visible[word.writer])
            race("written by the asynchronous proxy without fence.proxy.async", i, access.agent,
                 word);
        if (word.reader != kNone && (word.read_mask & mask) != 0)
            check_readers(clocks, i, mask, access);
        const bool again = word.writer == access.agent && word.write_clock == access.clock;
        word.write_mask = (again ? word.write_mask | mask : mask) & 15u;
        word.writer = static_cast<u16>(access.agent);
        word.write_clock = access.clock;
    }
}

static void note_one_of_several(std::vector<std::pair<u32, Clock>>& readers, Access access) {
    for (auto& [reader, clock] : readers)
        if (reader == access.agent) {
            clock = std::max(clock, access.clock);
            return;
        }
    readers.push_back({access.agent, access.clock});
}

void Shadow::note_reader(const Clocks& clocks, Word& word, u32 mask, Access access) {
    if (word.reader == kSeveral) {
        note_one_of_several(readers_[word.several], access);
        word.read_mask |= mask & 15u;
    } else if (word.reader == access.agent) {
        word.read_clock = std::max(word.read_clock, access.clock);
        word.read_mask |= mask & 15u;
    } else if (word.reader == kNone || word.read_clock <= clocks.order[word.reader]) {
        word.reader = static_cast<u16>(access.agent);
        word.read_clock = access.clock;
        word.read_mask = mask & 15u;
    } else {
        if (word.several == 0) {
            word.several = static_cast<u32>(readers_.size()) & 0xffffffu;
            readers_.emplace_back();
        }
        readers_[word.several] = {{word.reader, word.read_clock}, {access.agent, access.clock}};
        word.reader = kSeveral;
        word.read_mask |= mask & 15u;
    }
}

void Shadow::require_clock(const Word& word, bool async) {
    const Clock visible = async && agents_->is_generic(word.writer) ? word.write_clock : 0;
    for (auto& [agent, clock, must_see] : *required_)
        if (agent == word.writer) {
            clock = std::max(clock, word.write_clock);
            must_see = std::max(must_see, visible);
            return;
        }
    required_->push_back({word.writer, word.write_clock, visible});
}

bool Shadow::meets(const Clocks& clocks, const Required& required) {
    for (const auto& [agent, clock, must_see] : required)
        if (clocks.order[agent] < clock || clocks.visible[agent] < must_see) return false;
    return true;
}

void Shadow::read(const Warp& warp, u32 address, u32 bytes, Access access) {
    const Clocks& clocks = warp.clocks;
    u32 last_writer = kNone;  // most accesses are of a single writer's words
    Clock last_clock = 0;
    for (u32 i = address / 4, end = (address + bytes + 3) / 4; i < end; ++i) {
        Word& word = words_[i];
        const u32 mask = bytes_of(i, address, bytes);
        if (word.writer == kNone) race("read of what nobody wrote", i, access.agent, word);
        // What lies beside the last write is not known any more.
        if ((word.write_mask & mask) != 0 &&
            (word.writer != last_writer || word.write_clock != last_clock)) {
            if (word.write_clock > clocks.order[word.writer] && word.writer != access.agent)
                race("read after write without synchronization", i, access.agent, word);
            if (access.async && agents_->is_generic(word.writer) &&
                word.write_clock > clocks.visible[word.writer])
                race("read by the asynchronous proxy without fence.proxy.async", i, access.agent,
                     word);
            if (required_ != nullptr) require_clock(word, access.async);
            last_writer = word.writer;
            last_clock = word.write_clock;
        }
        note_reader(clocks, word, mask, access);
    }
}

void Shadow::use_mbarrier(const Warp& warp, u32 address) {
    if (agents_ == nullptr) return;
    const Word& word = words_[address / 4];
    if (word.writer == kNone || !agents_->is_warp(word.writer) || word.writer == warp.agent) return;
    if (word.write_clock <= warp.clocks.order[word.writer]) return;
    throw Fault("an mbarrier is used, but its initialization by " +
                agents_->name(word.writer, rank_) + " is not ordered before");
}

}  // namespace emulator
