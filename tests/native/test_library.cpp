// libvitrail against the driver stand-in, whose launches compute digests of what they are given:
// another pointer, size or order is another embedding. An embedding therefore says what went
// through together, and which halves did where memory lacked.
//
//     test_library CLIP VIT DRIVER THREADS CALLS FAULTS
//
// CLIP, VIT: folders of tests/export_folder.py. Ends with 0 and a line per test, or aborts.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "sha256.hpp"
#include "vitrail.h"

namespace {

enum Kind { kUint8, kFloat, kText, kScoresUint8, kScoresFloat };
bool is_bytes(Kind kind) { return kind == kUint8 || kind == kScoresUint8; }
bool is_scores(Kind kind) { return kind == kScoresUint8 || kind == kScoresFloat; }

// Items of one kind, the same for the same numbers.
struct Call {
    Kind kind;
    size_t n;
    unsigned seed;

    bool operator<(const Call& other) const {
        return std::tie(kind, n, seed) < std::tie(other.kind, other.n, other.seed);
    }
};

struct Items {
    std::vector<uint8_t> bytes;
    std::vector<float> floats;
    std::vector<int32_t> ids, lengths;
};

struct Result {
    vitrail_status code = VITRAIL_OK;
    std::vector<float> embeddings;  // or logits
    std::vector<int32_t> status;

    bool operator==(const Result& other) const {
        const size_t bytes = embeddings.size() * sizeof(float);
        return code == other.code && status == other.status &&
               embeddings.size() == other.embeddings.size() &&
               (bytes == 0 || std::memcmp(embeddings.data(), other.embeddings.data(), bytes) == 0);
    }
};

vitrail_facts facts_of(const vitrail_model* model) {
    vitrail_facts facts;
    CHECK(vitrail_model_facts(model, &facts) == VITRAIL_OK);
    return facts;
}

Items make(const vitrail_facts& facts, const Call& call) {
    Items items;
    std::mt19937 dice(call.seed * 1000 + call.kind);
    const size_t image =
        size_t{facts.image_height} * facts.image_width * facts.image_channels * call.n;
    if (is_bytes(call.kind)) {
        items.bytes.resize(image);
        for (uint8_t& byte : items.bytes) byte = static_cast<uint8_t>(dice());
    } else if (call.kind != kText) {
        items.floats.resize(image);
        for (float& number : items.floats) number = static_cast<float>(dice() % 1000) / 500 - 1;
    }
    for (size_t i = 0; call.kind == kText && i < call.n; ++i) {
        const auto length = static_cast<int32_t>(1 + dice() % facts.text_context);
        items.lengths.push_back(length);
        for (uint32_t at = 0; at < facts.text_context; ++at) {
            items.ids.push_back(static_cast<int32_t>(dice() % facts.text_vocab));
        }
    }
    return items;
}

// Items `first` and on of those that were made.
Result embed(vitrail_session* session, const vitrail_facts& facts, const Call& call,
             const Items& items, size_t first, size_t n) {
    const bool text = call.kind == kText;
    const bool scores = is_scores(call.kind);
    const size_t width = text     ? facts.text_embedding
                         : scores ? facts.image_labels
                                  : facts.image_embedding;
    const size_t image = size_t{facts.image_height} * facts.image_width * facts.image_channels;
    Result result{VITRAIL_OK, std::vector<float>(n * width, -1), std::vector<int32_t>(n, -1)};
    float* out = result.embeddings.data();
    int32_t* status = result.status.data();
    if (is_bytes(call.kind)) {
        const auto work = scores ? vitrail_classify_uint8 : vitrail_embed_uint8;
        result.code = work(session, items.bytes.data() + first * image, n, out, status);
    } else if (!text) {
        const auto work = scores ? vitrail_classify_float : vitrail_embed_float;
        result.code = work(session, items.floats.data() + first * image, n, out, status);
    } else {
        result.code =
            vitrail_embed_text(session, items.ids.data() + first * facts.text_context,
                               facts.text_context, items.lengths.data() + first, n, out, status);
    }
    return result;
}

class Bench {
  public:
    Bench(const char* folder, const char* driver) : folder_(folder), driver_(driver) { load(); }
    ~Bench() { vitrail_free(model); }

    void load() {
        const vitrail_options options{0, driver_, 0};
        CHECK(vitrail_load(folder_, &options, &model) == VITRAIL_OK);
        facts = facts_of(model);
    }
    void unload() {
        vitrail_free(model);
        model = nullptr;
    }
    vitrail_status try_load() {
        const vitrail_options options{0, driver_, 0};
        return vitrail_load(folder_, &options, &model);
    }
    vitrail_session* session() const {
        vitrail_session* made = nullptr;
        CHECK(vitrail_session_create(model, &made) == VITRAIL_OK);
        return made;
    }
    Result run(vitrail_session* session, const Call& call) const {
        return embed(session, facts, call, make(facts, call), 0, call.n);
    }

    // What a call gives when nothing else goes on, and nothing fails.
    const Result& expected(const Call& call) {
        const auto found = expected_.find(call);
        if (found != expected_.end()) return found->second;
        vitrail_session* own = session();
        const Result result = run(own, call);
        vitrail_session_free(own);
        CHECK(result.code == VITRAIL_OK);
        return expected_[call] = result;
    }

    // The same where memory lacked once.
    Result in_halves(const Call& call) {
        vitrail_session* own = session();
        const Items items = make(facts, call);
        const size_t half = (call.n + 1) / 2;
        Result whole = embed(own, facts, call, items, 0, half);
        const Result rest = embed(own, facts, call, items, half, call.n - half);
        CHECK(whole.code == VITRAIL_OK && rest.code == VITRAIL_OK);
        whole.embeddings.insert(whole.embeddings.end(), rest.embeddings.begin(),
                                rest.embeddings.end());
        whole.status.insert(whole.status.end(), rest.status.begin(), rest.status.end());
        vitrail_session_free(own);
        return whole;
    }

    vitrail_model* model = nullptr;
    vitrail_facts facts{};

  private:
    const char* const folder_;
    const char* const driver_;
    std::map<Call, Result> expected_;
};

// -- one thread

void test_sha256() {
    using namespace vitrail;
    std::mt19937 dice(1);
    std::vector<uint8_t> bytes(64 * 33);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(dice());
    sha256_detail::State a{1, 2, 3, 4, 5, 6, 7, 8}, b = a;
    sha256_detail::portable(a, bytes.data(), 33);
    if (sha256_detail::has_instructions()) {
        sha256_detail::by_instructions(b, bytes.data(), 33);
        CHECK(a == b);
    }
    CHECK(a[0] != 1);
    const Digest abc = sha256("abc", 3);  // FIPS 180-4's example
    CHECK(abc[0] == 0xba && abc[1] == 0x78 && abc[30] == 0x15 && abc[31] == 0xad);
}

void test_arguments(const Bench& clip, const Bench& vit) {
    vitrail_session* session = clip.session();
    vitrail_session* images = vit.session();
    const vitrail_facts& facts = clip.facts;
    std::vector<float> out(4 * facts.text_embedding);
    std::vector<int32_t> status(4), ids(2 * facts.text_context + 2, 5);
    ids[3] = 600;  // the highest
    const size_t context = facts.text_context;
    const auto says = [](vitrail_status code, vitrail_status wanted, const char* words) {
        CHECK(code == wanted);
        CHECK(std::strstr(vitrail_error(), words) != nullptr);
    };
    const auto embed_text = [&](size_t stride, const int32_t* lengths, size_t n) {
        return vitrail_embed_text(session, ids.data(), stride, lengths, n, out.data(),
                                  status.data());
    };
    says(vitrail_embed_uint8(nullptr, nullptr, 0, nullptr, nullptr), VITRAIL_INVALID, "session");
    says(vitrail_embed_uint8(session, nullptr, 1, out.data(), nullptr), VITRAIL_INVALID, "pixels");
    CHECK(vitrail_embed_uint8(session, nullptr, 0, nullptr, nullptr) == VITRAIL_OK);
    CHECK(vitrail_embed_text(session, nullptr, 0, nullptr, 0, nullptr, nullptr) == VITRAIL_OK);
    says(vitrail_embed_text(images, ids.data(), 4, nullptr, 1, out.data(), nullptr),
         VITRAIL_INVALID, "text");
    const int32_t none[] = {2, 0}, long_one[] = {2, 9}, negative[] = {2, -1};
    says(embed_text(4, none, 2), VITRAIL_INVALID, "text 1: got 0 ids");
    says(embed_text(4, long_one, 2), VITRAIL_INVALID, "text 1: got 9 ids in a row of 4");
    says(embed_text(4, negative, 2), VITRAIL_INVALID, "text 1: got -1 ids");
    says(embed_text(context + 1, nullptr, 1), VITRAIL_INVALID, "wanted 1 to 40");
    ids[2] = static_cast<int32_t>(facts.text_vocab);
    says(embed_text(4, nullptr, 1), VITRAIL_INVALID, "got id 700 at 2, wanted 0 to 699");
    ids[2] = -1;
    says(embed_text(4, nullptr, 1), VITRAIL_INVALID, "got id -1 at 2");
    ids[2] = 5;
    // what follows the end token, the first of the highest id, does not count
    const int32_t four[] = {4}, nine[] = {9};
    CHECK(embed_text(context, four, 1) == VITRAIL_OK);
    const std::vector<float> cut(out.begin(), out.begin() + facts.text_embedding);
    ids[7] = 600;
    CHECK(embed_text(context, nine, 1) == VITRAIL_OK);
    CHECK(std::equal(cut.begin(), cut.end(), out.begin()));
    ids[7] = 601;
    CHECK(embed_text(context, nine, 1) == VITRAIL_OK);
    CHECK(!std::equal(cut.begin(), cut.end(), out.begin()));
    vitrail_session_free(images);
    vitrail_session_free(session);
}

// The stand-in's status is a digest where a kernel of its own writes it, and 0 where none does.
void test_status(const Bench& clip, const Bench& vit) {
    vitrail_session* session = clip.session();
    vitrail_session* images = vit.session();
    const Call call{kUint8, 3, 0};
    const Items items = make(clip.facts, call), others = make(vit.facts, call);
    std::vector<float> out(3 * clip.facts.image_embedding), same(3 * vit.facts.image_embedding);
    CHECK(vitrail_embed_uint8(session, items.bytes.data(), 3, out.data(), nullptr) ==
          VITRAIL_NOT_FINITE);
    CHECK(std::strstr(vitrail_error(), "image 0: the embedding is not finite") != nullptr);
    const Result asked = clip.run(session, call);
    CHECK(asked.code == VITRAIL_OK && asked.status[0] != 0 && asked.status[2] == 0);
    CHECK(asked.embeddings == out);
    CHECK(vitrail_embed_uint8(images, others.bytes.data(), 3, same.data(), nullptr) == VITRAIL_OK);
    CHECK(vit.run(images, call).embeddings == same);
    vitrail_session_free(images);
    vitrail_session_free(session);
}

// Of logits, which no kernel looks at: among many digests some are no number.
void test_scores(const Bench& clip, const Bench& vit) {
    vitrail_session* session = vit.session();
    vitrail_session* none = clip.session();
    const size_t labels = vit.facts.image_labels;
    std::vector<float> out(3 * labels);
    unsigned odd = 0;
    for (unsigned seed = 0; seed < 3000 && odd < 3; ++seed) {
        const Call call{seed % 2 == 0 ? kScoresUint8 : kScoresFloat, 3, seed};
        const Result asked = vit.run(session, call);
        CHECK(asked.code == VITRAIL_OK);
        const Items items = make(vit.facts, call);
        const vitrail_status code =
            seed % 2 == 0
                ? vitrail_classify_uint8(session, items.bytes.data(), 3, out.data(), nullptr)
                : vitrail_classify_float(session, items.floats.data(), 3, out.data(), nullptr);
        CHECK(std::memcmp(out.data(), asked.embeddings.data(), out.size() * sizeof(float)) == 0);
        bool fine = true;
        for (size_t i = 0; i < 3; ++i) {
            const float* row = out.data() + i * labels;
            const bool finite =
                std::all_of(row, row + labels, [](float x) { return std::isfinite(x); });
            CHECK(asked.status[i] == (finite ? 0 : 1));
            fine = fine && finite;
        }
        CHECK(code == (fine ? VITRAIL_OK : VITRAIL_NOT_FINITE));
        if (fine) continue;
        CHECK(std::strstr(vitrail_error(), ": the class scores are not finite") != nullptr);
        ++odd;
    }
    CHECK(odd == 3);
    const Items items = make(clip.facts, {kUint8, 3, 0});
    CHECK(vitrail_classify_uint8(none, items.bytes.data(), 3, out.data(), nullptr) ==
          VITRAIL_INVALID);
    CHECK(std::strstr(vitrail_error(), "which the model does not have") != nullptr);
    vitrail_session_free(none);
    vitrail_session_free(session);
}

// Sizes up and down in one session: what a call gives does not depend on those before it, and one
// that is not larger than an earlier one allocates nothing.
void test_sizes(Bench& bench, const Standin& driver, const std::vector<Kind>& kinds) {
    vitrail_session* session = bench.session();
    for (const Kind kind : kinds) {
        for (const size_t n : {1, 2, 3, 7, 16, 40}) {
            CHECK(bench.run(session, {kind, n, 0}) == bench.expected({kind, n, 0}));
        }
    }
    for (const size_t n : {40, 33, 1, 17, 5}) {
        for (const Kind kind : kinds) {
            const Call call{kind, n, 0};
            const Items items = make(bench.facts, call);
            bench.expected(call);
            const Live before = driver.live();
            CHECK(embed(session, bench.facts, call, items, 0, n) == bench.expected(call));
            CHECK(driver.live() == before);
            driver.checks(false);  // the stand-in, which does nothing now, allocates nothing either
            driver.compute(false);
            const uint64_t allocated = allocations;
            CHECK(embed(session, bench.facts, call, items, 0, n).code == VITRAIL_OK);
            CHECK(allocations == allocated + 2);  // the two vectors of the result
            driver.compute(true);
            driver.checks(true);
        }
    }
    vitrail_session_free(session);
}

// -- many threads

void test_threads(Bench& bench, unsigned threads, unsigned calls) {
    std::vector<Call> all;
    for (const Kind kind : {kUint8, kFloat, kText}) {
        for (const size_t n : {0, 1, 2, 3, 5, 8, 13, 30}) {
            for (const unsigned seed : {1u, 2u}) {
                all.push_back({kind, n, seed});
                bench.expected(all.back());
            }
        }
    }
    std::vector<vitrail_session*> sessions;  // fewer than threads: some are shared
    for (unsigned i = 0; i < std::max(1u, threads * 3 / 4); ++i) {
        sessions.push_back(bench.session());
    }
    std::vector<std::thread> running;
    for (unsigned i = 0; i < threads; ++i) {
        running.emplace_back([&, i] {
            std::mt19937 dice(i);
            for (unsigned j = 0; j < calls; ++j) {
                const Call& call = all[dice() % all.size()];
                CHECK(bench.run(sessions[i % sessions.size()], call) == bench.expected(call));
            }
        });
    }
    for (std::thread& thread : running) thread.join();
    for (vitrail_session* session : sessions) vitrail_session_free(session);
}

// -- faults

constexpr int kLost[] = {700, 719, 999};
constexpr int kOnce[] = {46, 701};
constexpr int kMemory = 2;
constexpr int kCodes[] = {719, kMemory, 46, 700, kMemory, 999, kMemory, 701};

bool one_of(int code, const int* first, size_t n) {
    return std::find(first, first + n, code) != first + n;
}
bool lost(int code) { return one_of(code, kLost, std::size(kLost)); }

// One call while its n-th call of the driver fails; then calls that must work again.
void test_fault(Bench& bench, const Standin& driver, vitrail_session* session, const Call& call,
                uint64_t n, int code, bool launch) {
    const Result& wanted = bench.expected(call);
    const Result halves = call.n > 1 ? bench.in_halves(call) : wanted;
    CHECK(lost(code) || code == kMemory || one_of(code, kOnce, std::size(kOnce)));
    launch ? driver.fail_launch(n, code) : driver.fail(n, code);
    const Result result = bench.run(session, call);
    if (code == kMemory && call.n > 1) {
        CHECK(result == wanted || result == halves);
        CHECK(!launch || result == halves);
    } else if (code == kMemory) {
        CHECK(result.code == VITRAIL_OUT_OF_MEMORY || (!launch && result == wanted));
    } else if (result.code == VITRAIL_OK) {
        CHECK(!launch && result == wanted);  // the failure of a call that gives something back
    } else {
        CHECK(result.code == VITRAIL_DEVICE);
        CHECK(std::strstr(vitrail_error(), ": cu") != nullptr);  // which call, after where
    }
    if (lost(code)) CHECK(bench.run(session, call).code == VITRAIL_DEVICE);
    driver.reset();
    CHECK(bench.run(session, call) == wanted);
}

// Every call of a forward in turn, in a session that is new and in one that is warm.
unsigned test_faults(Bench& bench, const Standin& driver, unsigned most) {
    unsigned done = 0;
    const std::vector<Call> calls = {{kUint8, 5, 3}, {kText, 4, 3}, {kFloat, 1, 3}, {kText, 1, 4}};
    for (const Call& call : calls) bench.expected(call);
    for (unsigned round = 0; done < most; ++round) {
        const Call& call = calls[round % calls.size()];
        const bool warm = round / 4 % 2 == 0;
        vitrail_session* session = bench.session();
        if (warm) bench.run(session, call);
        const uint64_t calls_before = driver.calls(), launches_before = driver.launches();
        bench.run(session, call);
        const uint64_t count = driver.calls() - calls_before;
        const uint64_t launches = driver.launches() - launches_before;
        CHECK(count > launches && launches > 5);
        const unsigned step = most > 400 ? 1 : 7;  // of the calls, each round begins elsewhere
        for (uint64_t n = 1 + round % step; n <= count && done < most; n += step) {
            if (!warm) {
                vitrail_session_free(session);
                session = bench.session();
            }
            test_fault(bench, driver, session, call, n, kCodes[(n + round) % 8], false);
            ++done;
        }
        for (uint64_t n = 1 + round % 3; n <= launches && done < most; n += 5) {
            test_fault(bench, driver, session, call, n, kCodes[(n + round) % 8], true);
            ++done;
        }
        vitrail_session_free(session);
    }
    return done;
}

void test_load_faults(Bench& bench, const Standin& driver, unsigned most) {
    bench.unload();
    const Live nothing{};
    CHECK(driver.live() == nothing);
    const uint64_t before = driver.calls();
    bench.load();
    const uint64_t count = driver.calls() - before;
    bench.unload();
    CHECK(count > 50);
    const uint64_t step = std::max<uint64_t>(1, count / most);
    unsigned round = 0, failed = 0;
    for (uint64_t n = 1; n <= count; n += step) {
        const int code = kCodes[round++ % 8];
        driver.fail(n, code);
        const vitrail_status status = bench.try_load();
        if (status == VITRAIL_OK) {  // struck where something is given back
            bench.unload();
        } else {
            const bool memory = code == kMemory;
            CHECK(status == (memory ? VITRAIL_OUT_OF_MEMORY : VITRAIL_DEVICE));
            CHECK(bench.model == nullptr && std::strlen(vitrail_error()) > 10);
            ++failed;
        }
        driver.reset();
        CHECK(driver.live() == nothing);
    }
    CHECK(failed > round / 2);
    bench.load();
}

// A device with little memory, instead of one call that fails.
void test_little_memory(Bench& bench, const Standin& driver) {
    const Call call{kUint8, 40, 5};
    const Result& wanted = bench.expected(call);
    const Result halves = bench.in_halves(call);
    CHECK(!(wanted == halves));
    const uint64_t weights = driver.live().bytes;
    vitrail_session* session = bench.session();
    bench.run(session, call);
    const uint64_t needed = driver.live().bytes - weights;
    vitrail_session_free(session);
    session = bench.session();
    driver.memory(weights + needed - 1);
    CHECK(bench.run(session, call) == halves);
    CHECK(bench.run(session, call) == halves);  // and again, now that it knows
    driver.memory(weights + 1000);
    vitrail_session* other = bench.session();
    CHECK(bench.run(other, call).code == VITRAIL_OUT_OF_MEMORY);
    CHECK(driver.live().bytes == weights);  // what the first had left was freed for the other
    driver.memory(uint64_t{80} << 30);
    CHECK(bench.run(other, call) == wanted);
    CHECK(bench.run(session, call) == wanted);
    vitrail_session_free(other);
    vitrail_session_free(session);
}

// A session that ends leaves nothing behind, and one that grows holds nothing twice.
void test_memory_goes_back(Bench& bench, const Standin& driver) {
    const Call small{kUint8, 16, 5}, large{kUint8, 40, 5};
    const Result& wanted = bench.expected(large);
    const Live before = driver.live();
    vitrail_session* session = bench.session();
    CHECK(bench.run(session, large) == wanted);
    const uint64_t needed = driver.live().bytes;
    vitrail_session_free(session);
    CHECK(driver.live() == before);
    session = bench.session();
    bench.run(session, small);
    driver.memory(needed);
    CHECK(bench.run(session, large) == wanted);  // at once, not in halves
    driver.memory(uint64_t{80} << 30);
    vitrail_session_free(session);
    CHECK(driver.live() == before);
}

// The driver's bytes, at their most and after each call, are those that were allowed and are told.
void test_limit(Bench& bench, const Standin& driver) {
    const Bench& b = bench;
    for (const Kind kind : {kUint8, kFloat, kText}) {
        const Call call{kind, 4096, 11}, one{kind, 1, 11};
        const Items items = make(b.facts, call);
        vitrail_session* session = b.session();
        const uint64_t weights = driver.live().bytes;
        CHECK(vitrail_session_memory(session) == 0);
        CHECK(embed(session, b.facts, call, items, 0, 1).code == VITRAIL_OK);
        const uint64_t single = driver.live().bytes - weights;
        CHECK(vitrail_session_memory(session) == single && single > 1000);
        CHECK(vitrail_session_trim(session) == single);
        CHECK(driver.live().bytes == weights && vitrail_session_memory(session) == 0);
        CHECK(embed(session, b.facts, call, items, 0, 4096).code == VITRAIL_OK);
        const uint64_t whole = vitrail_session_memory(session);
        CHECK(whole > 1000 * single / 8 && whole == driver.live().bytes - weights);

        vitrail_session_trim(session);  // the next call takes what it needs, not what was needed
        CHECK(embed(session, b.facts, call, items, 0, 1).code == VITRAIL_OK);
        CHECK(vitrail_session_memory(session) == single);

        // texts of other lengths need more or less than the first
        const uint64_t longest = kind == kText ? 2 * b.facts.text_context * single : single;
        for (const uint64_t limit : {longest, 3 * longest, 10 * longest + 7, whole / 3}) {
            CHECK(vitrail_session_limit(session, limit) == VITRAIL_OK);
            vitrail_session_trim(session);
            driver.peak();
            const Result cut = embed(session, b.facts, call, items, 0, 4096);
            CHECK(cut.code == VITRAIL_OK);
            const uint64_t peak = driver.peak() - weights;
            CHECK(peak <= limit && peak > limit / 4);
            CHECK(vitrail_session_memory(session) == driver.live().bytes - weights);
            // digests are of what ran together: the same parts by hand
            if (kind == kText || limit != 3 * longest) continue;
            size_t part = 1;
            vitrail_session* free_session = b.session();
            for (; part < 64; ++part) {
                vitrail_session_trim(free_session);
                embed(free_session, b.facts, call, items, 0, part + 1);
                if (vitrail_session_memory(free_session) > limit) break;
            }
            CHECK(part > 1 && part < 64);
            std::vector<float> by_hand;
            for (size_t first = 0; first < 4096; first += part) {
                const size_t n = std::min(part, 4096 - first);
                const Result piece = embed(free_session, b.facts, call, items, first, n);
                by_hand.insert(by_hand.end(), piece.embeddings.begin(), piece.embeddings.end());
            }
            CHECK(std::memcmp(by_hand.data(), cut.embeddings.data(),
                              by_hand.size() * sizeof(float)) == 0);
            vitrail_session_free(free_session);
        }

        // a lower limit than memory that is idle, or than an earlier call's
        CHECK(vitrail_session_limit(session, 0) == VITRAIL_OK);
        embed(session, b.facts, call, items, 0, 4096);
        CHECK(vitrail_session_limit(session, 4 * longest) == VITRAIL_OK);
        CHECK(embed(session, b.facts, call, items, 0, 4096).code == VITRAIL_OK);
        CHECK(vitrail_session_memory(session) <= 4 * longest);

        // a call that was made before allocates nothing, in parts too
        const size_t n = kind == kText ? 5 : 4096;
        embed(session, b.facts, call, items, 0, n);
        const Live before = driver.live();
        driver.checks(false);
        driver.compute(false);
        const uint64_t allocated = allocations;
        CHECK(embed(session, b.facts, call, items, 0, n).code == VITRAIL_OK);
        CHECK(allocations == allocated + 2);  // the two vectors of the result
        driver.compute(true);
        driver.checks(true);
        CHECK(driver.live() == before);

        CHECK(vitrail_session_limit(session, single / 3) == VITRAIL_OK);
        CHECK(embed(session, b.facts, call, items, 0, 9).code == VITRAIL_OUT_OF_MEMORY);
        const std::string words = "the session's limit: got " + std::to_string(single / 3);
        CHECK(std::strstr(vitrail_error(), words.c_str()) != nullptr);
        if (kind != kText) {
            const std::string wanted = "wanted " + std::to_string(single) + " for one image";
            CHECK(std::strstr(vitrail_error(), wanted.c_str()) != nullptr);
            CHECK(vitrail_session_limit(session, single) == VITRAIL_OK);
            CHECK(embed(session, b.facts, call, items, 0, 9).code == VITRAIL_OK);
            CHECK(vitrail_session_limit(session, single - 1) == VITRAIL_OK);
            CHECK(embed(session, b.facts, call, items, 0, 9).code == VITRAIL_OUT_OF_MEMORY);
        }
        CHECK(vitrail_session_limit(session, 0) == VITRAIL_OK);
        CHECK(bench.run(session, one) == bench.expected(one));
        vitrail_session_free(session);
        CHECK(driver.live().bytes == weights);
    }
    CHECK(vitrail_session_limit(nullptr, 1) == VITRAIL_INVALID);
    CHECK(vitrail_session_trim(nullptr) == 0 && vitrail_session_memory(nullptr) == 0);
}

// Sessions, of two models too, that run one after another use the same memory.
void test_shared_memory(Bench& clip, Bench& vit, const Standin& driver) {
    const Call call{kUint8, 40, 12};
    const Result wanted = clip.expected(call), others = vit.expected(call);
    const uint64_t weights = driver.live().bytes;
    std::vector<vitrail_session*> sessions;
    uint64_t most = 0;
    for (int i = 0; i < 8; ++i) {
        Bench& bench = i % 2 == 0 ? clip : vit;
        sessions.push_back(bench.session());
        CHECK(bench.run(sessions.back(), call) == (i % 2 == 0 ? wanted : others));
        if (i == 1) most = driver.live().bytes;
    }
    CHECK(driver.live().bytes == most && driver.live().streams == 1);
    CHECK(vitrail_session_memory(sessions[0]) == most - weights);
    CHECK(vitrail_session_memory(sessions[7]) == most - weights);
    CHECK(vitrail_session_trim(sessions[3]) == most - weights);
    CHECK(driver.live().bytes == weights);
    CHECK(clip.run(sessions[0], call) == wanted);
    CHECK(vit.run(sessions[1], call) == others);
    CHECK(driver.live().bytes == most);
    for (vitrail_session* session : sessions) vitrail_session_free(session);
    CHECK(driver.live().bytes == weights && driver.live().streams == 0);
}

// Sessions that begin, call and end at once leave no memory behind, whoever ends last.
void test_brief_sessions(Bench& bench, const Standin& driver) {
    const Call call{kText, 2, 14};
    const Result wanted = bench.expected(call);
    const Live before = driver.live();
    for (int round = 0; round < 400; ++round) {
        std::vector<std::thread> running;
        for (int i = 0; i < 4; ++i) {
            running.emplace_back([&] {
                vitrail_session* session = bench.session();
                CHECK(bench.run(session, call) == wanted);
                vitrail_session_free(session);
            });
        }
        for (std::thread& thread : running) thread.join();
        CHECK(driver.live() == before);
    }
}

// A thread asks and trims while others call, with limits of their own.
void test_trim_at_any_time(Bench& bench, const Standin& driver) {
    const Call call{kText, 30, 13};
    const Result wanted = bench.expected(call);
    const uint64_t weights = driver.live().bytes;
    std::vector<vitrail_session*> sessions;
    for (int i = 0; i < 4; ++i) sessions.push_back(bench.session());
    std::vector<std::thread> running;
    for (size_t i = 0; i < sessions.size(); ++i) {
        running.emplace_back([&, i] {
            for (int round = 0; round < 30; ++round) {
                CHECK(vitrail_session_limit(sessions[i], 0) == VITRAIL_OK);
                CHECK(bench.run(sessions[i], call) == wanted);
                if (i % 2 == 0) vitrail_session_trim(sessions[(i + 1) % 4]);
                vitrail_session_memory(sessions[(i + 2) % 4]);
            }
        });
    }
    for (std::thread& thread : running) thread.join();
    vitrail_session_trim(sessions[0]);
    CHECK(driver.live().bytes == weights);
    for (vitrail_session* session : sessions) vitrail_session_free(session);
}

// Of a device that has no stream-ordered memory: found out once, and done without.
void test_no_pools(Bench& bench, const Standin& driver) {
    constexpr int kNotSupported = 801;
    const Call small{kUint8, 3, 7}, large{kUint8, 20, 7};
    const Result wanted = bench.expected(small), more = bench.expected(large);
    const Live before = driver.live();
    const auto run = [&](uint64_t n) {  // in a new session, whose n-th call says so
        vitrail_session* session = bench.session();
        driver.fail(n, kNotSupported);
        const Result result = bench.run(session, small);
        driver.fail(0, 0);
        CHECK(bench.run(session, large) == more);
        CHECK(bench.run(session, small) == wanted);
        vitrail_session_free(session);
        CHECK(driver.live() == before);
        return result;
    };
    vitrail_session* session = bench.session();
    const uint64_t first = driver.calls();
    bench.run(session, small);
    const uint64_t count = driver.calls() - first;
    vitrail_session_free(session);
    unsigned found = 0;
    for (uint64_t n = 1; n <= count; ++n) {
        const Result result = run(n);
        CHECK(result.code == VITRAIL_DEVICE || result == wanted);
        // the same call is now another, which every device has
        if (result.code == VITRAIL_OK && run(n).code == VITRAIL_DEVICE) ++found;
    }
    CHECK(found == 1);
    CHECK(driver.complaint()[0] == '\0');
    bench.unload();
    bench.load();
}

// While another thread captures a CUDA graph, which is nobody's here.
void test_capturing(Bench& bench, const Standin& driver) {
    constexpr int kGlobal = 0;
    const Call call{kText, 9, 8};
    const Result wanted = bench.expected(call);
    bench.unload();
    driver.capturing(true);
    bench.load();
    driver.capturing(false);
    vitrail_session* session = bench.session();
    driver.capturing(true);
    CHECK(bench.run(session, {kText, 2, 8}).code == VITRAIL_OK);
    CHECK(bench.run(session, call) == wanted);
    vitrail_session_free(session);
    bench.unload();
    driver.capturing(false);
    CHECK(driver.complaint()[0] == '\0');
    CHECK(driver.live() == Live{});
    CHECK(driver.exchange_mode(kGlobal) == kGlobal);  // as it was
    bench.load();
}

// The host's memory lacks, at each of many allocations in turn: said, and nothing stays behind.
void test_no_host_memory(Bench& bench, const Standin& driver, unsigned most) {
    const Call call{kText, 6, 9};
    const Result wanted = bench.expected(call);
    const Items items = make(bench.facts, call);
    Result result = wanted;
    const auto forward = [&](vitrail_session* session) {
        return vitrail_embed_text(session, items.ids.data(), bench.facts.text_context,
                                  items.lengths.data(), call.n, result.embeddings.data(),
                                  result.status.data());
    };
    unsigned failed = 0;
    const auto sweep = [&](const auto& work) {  // `work` says whether all went well
        constexpr uint64_t kNever = uint64_t{1} << 60;
        allocation_fault = kNever;
        CHECK(work());
        const uint64_t count = kNever - allocation_fault;
        CHECK(count > 10 && count < kNever);
        const uint64_t step = std::max<uint64_t>(1, count / most);  // less than there are threads
        for (uint64_t n = 1; n <= count; n += step) {
            allocation_fault = n;
            const bool good = work();
            allocation_fault = 0;
            if (good) continue;  // with fewer threads
            CHECK(std::strstr(vitrail_error(), "the host's memory") != nullptr);
            ++failed;
        }
    };
    sweep([&] {
        vitrail_session* session = nullptr;
        if (vitrail_session_create(bench.model, &session) != VITRAIL_OK) return false;
        const bool good = forward(session) == VITRAIL_OK;
        const uint64_t left = std::exchange(allocation_fault, 0);
        CHECK(forward(session) == VITRAIL_OK && result == wanted);
        allocation_fault = left;
        vitrail_session_free(session);
        return good;
    });
    bench.unload();
    sweep([&] {
        const bool good = bench.try_load() == VITRAIL_OK;
        bench.unload();
        CHECK(driver.live() == Live{});
        return good;
    });
    CHECK(failed > 100);
    bench.load();
}

void test_lifetimes(Bench& bench, const Standin& driver) {
    const Call call{kText, 6, 6};
    const Result wanted = bench.expected(call);
    vitrail_session* session = bench.session();
    bench.unload();  // the session keeps what it needs
    CHECK(bench.run(session, call) == wanted);
    vitrail_session_free(session);
    CHECK(driver.live() == Live{});
    vitrail_free(nullptr);
    vitrail_session_free(nullptr);
    bench.load();
}

void say(const char* line) {
    std::printf("%s\n", line);
    std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 7) {
        std::fprintf(stderr, "test_library CLIP VIT DRIVER THREADS CALLS FAULTS\n");
        return 2;
    }
    const auto number = [&](int i) { return static_cast<unsigned>(std::stoul(arguments[i])); };
    alarm(3000);  // a hang ends
    const Standin driver(arguments[3]);
    driver.undo(true);
    {
        test_sha256();
        Bench clip(arguments[1], arguments[3]), vit(arguments[2], arguments[3]);
        test_arguments(clip, vit);
        test_status(clip, vit);
        test_scores(clip, vit);
        say("arguments");
        test_sizes(clip, driver, {kUint8, kFloat, kText});
        test_sizes(vit, driver, {kUint8, kScoresFloat, kFloat, kScoresUint8});
        say("sizes");
        test_threads(clip, number(4), number(5));
        say("threads");
        test_limit(clip, driver);
        test_shared_memory(clip, vit, driver);
        test_brief_sessions(clip, driver);
        test_trim_at_any_time(clip, driver);
        say("limits");
        vit.unload();
        test_lifetimes(clip, driver);
        test_little_memory(clip, driver);
        test_memory_goes_back(clip, driver);
        test_no_pools(clip, driver);
        say("memory");
        test_capturing(clip, driver);
        say("capturing");
        test_no_host_memory(clip, driver, 2 * number(6));
        say("host memory");
        CHECK(driver.complaint()[0] == '\0');
        std::printf("%u faults\n", test_faults(clip, driver, number(6)));
        test_load_faults(clip, driver, number(6));
        say("load");
    }
    CHECK(driver.live() == Live{});
    return 0;
}
