// Reads what engine/vitrail/plan/record.py encodes: little-endian numbers, and lists and strings with
// their length before them. Bytes that end early, or are left over, are refused.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace vitrail {

// Bytes that are not what they should be: a damaged file, or another version's.
class FormatError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class Reader {
  public:
    // `what` names the bytes in errors; `magic` is what they must begin with.
    Reader(std::string_view bytes, std::string what, std::string_view magic)
        : bytes_(bytes), what_(std::move(what)) {
        if (bytes_.substr(0, magic.size()) != magic) {
            fail("got other first bytes, wanted " + std::string(magic));
        }
        at_ = magic.size();
    }

    template <typename Number>
    Number number() {
        static_assert(std::is_arithmetic_v<Number>);
        Number value;
        std::memcpy(&value, take(sizeof value).data(), sizeof value);
        return value;
    }

    std::string_view bytes() { return take(number<uint64_t>()); }
    std::string string() { return std::string(bytes()); }

    // A list of what `read` gives.
    template <typename Read>
    auto list(Read read) -> std::vector<decltype(read(*this))> {
        const auto count = number<uint32_t>();
        want(count <= bytes_.size() - at_, "a list longer than the file");
        std::vector<decltype(read(*this))> items;
        items.reserve(count);
        for (uint32_t i = 0; i < count; ++i) items.push_back(read(*this));
        return items;
    }

    void end() const { want(at_ == bytes_.size(), "bytes after the end"); }

    // Refuses unless `good`; `got` says what was found.
    void want(bool good, const char* got) const {
        if (!good) fail(std::string("got ") + got);
    }

    [[noreturn]] void fail(const std::string& why) const { throw FormatError(what_ + ": " + why); }

  private:
    std::string_view take(uint64_t count) {
        if (count > bytes_.size() - at_) {
            fail("got " + std::to_string(bytes_.size()) + " bytes, which end early");
        }
        const std::string_view part = bytes_.substr(at_, count);
        at_ += count;
        return part;
    }

    std::string_view bytes_;
    std::string what_;
    size_t at_ = 0;
};

}  // namespace vitrail
