// PTX without comments, and which line of the Python or CUDA source each of its lines came from.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "values.hpp"

namespace emulator {

// Text between blanks at both ends, words between blanks, parts between commas outside brackets.
std::string trimmed(const std::string& text);
std::vector<std::string> words_of(const std::string& text);
std::vector<std::string> parts_of(const std::string& text);
// Whether the text is a number of PTX; 0f and 0d give the bits of a float or double.
bool read_number(const std::string& text, u64& value);

class SourceText {
  public:
    explicit SourceText(const std::string& ptx);

    const std::string& text() const { return text_; }
    // Of an offset in `text`. Offsets must not decrease from call to call.
    u32 line_at(size_t offset);
    u32 source_of(u32 line) const { return line < by_line_.size() ? by_line_[line] : 0; }
    // "file.py:12:5", by the numbers that source_of gives; 0 is "".
    std::vector<std::string> sources() const;

  private:
    std::string text_;
    std::vector<u32> by_line_;
    std::map<std::string, std::string> files_;  // .file: number, name
    std::vector<std::string> locations_{""};    // "file number:line:column", or a comment's text
    std::vector<bool> resolved_{true};          // whether it is a comment's text
    size_t counted_ = 0;
    u32 line_ = 1;

    void read_directive(const std::string& line);
};

}  // namespace emulator
