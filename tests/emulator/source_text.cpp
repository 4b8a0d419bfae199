#include "source_text.hpp"

#include <cctype>
#include <cstdlib>

namespace emulator {

static bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

std::string trimmed(const std::string& text) {
    size_t first = 0, last = text.size();
    while (first < last && is_space(text[first])) ++first;
    while (last > first && is_space(text[last - 1])) --last;
    return text.substr(first, last - first);
}

std::vector<std::string> words_of(const std::string& text) {
    std::vector<std::string> words;
    std::string word;
    for (char c : text + " ") {
        if (!is_space(c)) {
            word += c;
        } else if (!word.empty()) {
            words.push_back(word);
            word.clear();
        }
    }
    return words;
}

std::vector<std::string> parts_of(const std::string& text) {
    std::vector<std::string> parts;
    if (trimmed(text).empty()) return parts;
    std::string part;
    int depth = 0;
    for (char c : text) {
        if (c == '{' || c == '[' || c == '(') ++depth;
        if (c == '}' || c == ']' || c == ')') --depth;
        if (c == ',' && depth == 0) {
            parts.push_back(trimmed(part));
            part.clear();
        } else {
            part += c;
        }
    }
    parts.push_back(trimmed(part));
    return parts;
}

bool read_number(const std::string& text, u64& value) {
    const size_t first = !text.empty() && text[0] == '-' ? 1 : 0;
    if (text.size() == first || !std::isdigit(static_cast<unsigned char>(text[first])))
        return false;
    const char* start = text.c_str();
    char* end = nullptr;
    const char prefix = text.size() > 2 && text[0] == '0' ? text[1] : ' ';
    if (prefix == 'f' || prefix == 'F' || prefix == 'd' || prefix == 'D')
        value = std::strtoull(start + 2, &end, 16);
    else if (first == 1)
        value = static_cast<u64>(std::strtoll(start, &end, 0));
    else
        value = std::strtoull(start, &end, 0);
    if (*end == 'U') ++end;
    return *end == '\0';
}

SourceText::SourceText(const std::string& ptx) {
    std::string line;
    u32 source = 0;
    bool in_comment = false;
    by_line_.push_back(0);
    for (size_t start = 0; start < ptx.size();) {
        size_t end = ptx.find('\n', start);
        if (end == std::string::npos) end = ptx.size();
        line.clear();
        size_t slashes = std::string::npos;  // start of a comment to the line's end
        for (size_t i = start; i < end; ++i) {
            if (in_comment) {
                if (ptx.compare(i, 2, "*/") == 0) {
                    in_comment = false;
                    ++i;
                }
            } else if (ptx.compare(i, 2, "/*") == 0) {
                in_comment = true;
                ++i;
            } else if (ptx.compare(i, 2, "//") == 0) {
                slashes = i;
                break;
            } else {
                line += ptx[i];
            }
        }
        const std::string directive = trimmed(line);
        const std::string name = directive.substr(0, directive.find_first_of(" \t"));
        if (name == ".loc" || name == ".file") {
            read_directive(directive);
            if (directive[1] == 'l') {
                if (slashes != std::string::npos) {
                    locations_.back() = trimmed(ptx.substr(slashes + 2, end - slashes - 2));
                    resolved_.back() = true;
                }
                source = static_cast<u32>(locations_.size() - 1);
            }
            line.clear();
        }
        by_line_.push_back(source);
        text_ += line + "\n";
        start = end + 1;
    }
}

void SourceText::read_directive(const std::string& line) {
    const std::vector<std::string> words = words_of(line);
    if (words.size() < 3) return;
    if (words[0] == ".loc") {
        std::string location = words[1] + ":" + words[2];
        if (words.size() > 3) location += ":" + words[3].substr(0, words[3].find(','));
        locations_.push_back(location);
        resolved_.push_back(false);
        return;
    }
    const size_t open = line.find('"'), close = line.find('"', open + 1);
    if (close == std::string::npos) return;
    const std::string path = line.substr(open + 1, close - open - 1);
    files_[words[1]] = path.substr(path.rfind('/') + 1);
}

std::vector<std::string> SourceText::sources() const {
    std::vector<std::string> result;
    for (size_t i = 0; i < locations_.size(); ++i) {
        const size_t colon = locations_[i].find(':');
        const auto file = files_.find(locations_[i].substr(0, colon));
        if (resolved_[i] || file == files_.end())
            result.push_back(locations_[i]);
        else
            result.push_back(file->second + locations_[i].substr(colon));
    }
    return result;
}

u32 SourceText::line_at(size_t offset) {
    while (counted_ < offset)
        if (text_[counted_++] == '\n') ++line_;
    return line_;
}

}  // namespace emulator
