// Reads the encoding of engine/vitrail/plan/record.py: little-endian numbers; lists and strings are
// preceded by their length. Refuses input that ends early or has bytes left over.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace vitrail {

// The bytes of a file are damaged, or have another plan grammar or kernel ABI.
class FormatError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class Reader {
  public:
    // `name` names the input in errors. The input must begin with `magic`.
    Reader(std::string_view bytes, std::string name, std::string_view magic)
        : bytes_(bytes), name_(std::move(name)) {
        if (bytes_.substr(0, magic.size()) != magic) {
            fail("got other first bytes, wanted " + std::string(magic));
        }
        position_ = magic.size();
    }

    template <typename Number>
    Number number() {
        static_assert(std::is_arithmetic_v<Number>);
        Number value;
        std::memcpy(&value, take(sizeof value).data(), sizeof value);
        return value;
    }

    // Reads several numbers, each of its own type.
    template <typename... Numbers>
    void read(Numbers&... numbers) {
        ((numbers = number<Numbers>()), ...);
    }

    std::string_view bytes() { return take(number<uint64_t>()); }
    std::string string() { return std::string(bytes()); }

    // A list; `read_item` reads one item.
    template <typename ReadItem>
    auto list(ReadItem read_item) -> std::vector<decltype(read_item(*this))> {
        const auto count = number<uint32_t>();
        want(count <= bytes_.size() - position_, "a list longer than the file");
        std::vector<decltype(read_item(*this))> items;
        items.reserve(count);
        for (uint32_t i = 0; i < count; ++i) items.push_back(read_item(*this));
        return items;
    }

    std::string_view rest() const { return bytes_.substr(position_); }

    void end() const { want(position_ == bytes_.size(), "bytes after the end"); }

    // Throws FormatError "got `problem`" unless `valid`.
    void want(bool valid, const char* problem) const {
        if (!valid) fail(std::string("got ") + problem);
    }

    [[noreturn]] void fail(const std::string& why) const { throw FormatError(name_ + ": " + why); }

  private:
    std::string_view take(uint64_t count) {
        if (count > bytes_.size() - position_) {
            fail("got " + std::to_string(bytes_.size()) + " bytes, which end early");
        }
        const std::string_view taken = bytes_.substr(position_, count);
        position_ += count;
        return taken;
    }

    std::string_view bytes_;
    std::string name_;
    size_t position_ = 0;
};

}  // namespace vitrail
