// libvitrail on two devices of the driver stand-in at once, from many threads. Digests follow from
// the inputs of a forward, so both devices must give what one gives alone.
//
//     test_devices CLIP DRIVER THREADS CALLS
//
// CLIP: a folder of tests/export_folder.py. Ends with 0 and the launches on each device, or aborts.
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "driver.hpp"
#include "vitrail.h"

namespace {

constexpr size_t kBatches[] = {1, 2, 3, 8, 20};
constexpr int kLost = 719;  // CUDA_ERROR_LAUNCH_FAILED

class Model {
  public:
    Model(const char* folder, const char* driver, int device) {
        const vitrail_options options{device, driver, 0};
        CHECK(vitrail_load(folder, &options, &model_) == VITRAIL_OK);
        CHECK(vitrail_model_facts(model_, &facts) == VITRAIL_OK);
    }
    ~Model() { vitrail_free(model_); }

    vitrail_session* session() const {
        vitrail_session* made = nullptr;
        CHECK(vitrail_session_create(model_, &made) == VITRAIL_OK);
        return made;
    }

    vitrail_facts facts;

  private:
    vitrail_model* model_ = nullptr;
};

// Images of one batch, the same for the same number.
std::vector<float> embed(vitrail_session* session, const vitrail_facts& facts, size_t n,
                         vitrail_status wanted = VITRAIL_OK) {
    std::mt19937 dice(static_cast<unsigned>(n));
    std::vector<uint8_t> pixels(n * facts.image_height * facts.image_width * facts.image_channels);
    for (uint8_t& byte : pixels) byte = static_cast<uint8_t>(dice());
    std::vector<float> out(n * facts.image_embedding, -1);
    std::vector<int32_t> status(n);
    CHECK(vitrail_embed_uint8(session, pixels.data(), n, out.data(), status.data()) == wanted);
    return out;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

using Expected = std::array<std::vector<float>, std::size(kBatches)>;

std::array<std::atomic<uint64_t>, 2> calls_on;

// Threads that call one device, and every fourth that calls both in turn; counts the calls.
void test_threads(const Model (&models)[2], const Standin& driver, const Expected& expected,
                  unsigned threads, unsigned calls) {
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
        running.emplace_back([&, thread] {
            std::mt19937 dice(thread);
            const int program = static_cast<int>(thread / 2 % 2);
            driver.push_context(program);  // the program's own, of either device
            vitrail_session* sessions[2] = {models[0].session(), models[1].session()};
            for (unsigned call = 0; call < calls; ++call) {
                const unsigned device = (thread % 4 == 3 ? call : thread) % 2;
                const size_t which = dice() % std::size(kBatches);
                const size_t n = kBatches[which];
                ++calls_on[device];
                CHECK(same(embed(sessions[device], models[device].facts, n), expected[which]));
            }
            for (vitrail_session* session : sessions) vitrail_session_free(session);
            driver.pop_context(program);
        });
    }
    for (std::thread& thread : running) thread.join();
}

// One device lacks memory, then is lost; the other goes on.
void test_faults(const Model (&models)[2], const Standin& driver, const Expected& expected) {
    vitrail_session* sessions[2] = {models[0].session(), models[1].session()};
    const auto on = [&](int device, size_t which, vitrail_status wanted = VITRAIL_OK) {
        return embed(sessions[device], models[device].facts, kBatches[which], wanted);
    };
    const size_t most = std::size(kBatches) - 1;
    driver.memory(driver.live(1).bytes + 1000, 1);
    on(1, most, VITRAIL_OUT_OF_MEMORY);
    CHECK(same(on(0, most), expected[most]));
    driver.memory(uint64_t{80} << 30, 1);
    CHECK(same(on(1, most), expected[most]));
    driver.fail_launch(3, kLost, 1);
    for (int i = 0; i < 3; ++i) {
        on(1, 1, VITRAIL_DEVICE);
        CHECK(same(on(0, 1), expected[1]));
    }
    driver.reset();
    CHECK(same(on(1, 1), expected[1]));
    for (vitrail_session* session : sessions) vitrail_session_free(session);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 5) {
        std::fprintf(stderr, "test_devices CLIP DRIVER THREADS CALLS\n");
        return 2;
    }
    const auto number = [&](int i) { return static_cast<unsigned>(std::stoul(arguments[i])); };
    alarm(600);  // a hang ends
    const Standin driver(arguments[2]);
    driver.undo(true);
    CHECK(driver.add_device(9, 0, 132) == 1);
    Expected expected;
    {
        const Model alone(arguments[1], arguments[2], 0);
        vitrail_session* session = alone.session();
        for (size_t i = 0; i < expected.size(); ++i)
            expected[i] = embed(session, alone.facts, kBatches[i]);
        vitrail_session_free(session);
        CHECK(driver.launches(1) == 0);
        CHECK(driver.live(1) == Live{});
    }
    {
        const Model models[2] = {{arguments[1], arguments[2], 0}, {arguments[1], arguments[2], 1}};
        CHECK(driver.live(0) == driver.live(1));
        const uint64_t before = driver.launches(0), of_a_call = before / expected.size();
        test_threads(models, driver, expected, number(3), number(4));
        CHECK(driver.complaint()[0] == '\0');  // no call without its context, none of another's
        CHECK(calls_on[0] > 0 && calls_on[1] > 0);
        CHECK(driver.launches(0) - before == of_a_call * calls_on[0]);
        CHECK(driver.launches(1) == of_a_call * calls_on[1]);
        for (int device = 0; device < 2; ++device)
            std::printf("%llu launches on device %d\n",
                        static_cast<unsigned long long>(driver.launches(device)), device);
        test_faults(models, driver, expected);
        const vitrail_options options{2, arguments[2], 0};
        vitrail_model* none = nullptr;
        CHECK(vitrail_load(arguments[1], &options, &none) != VITRAIL_OK);
        driver.reset();
    }
    CHECK(driver.live() == Live{});
    CHECK(driver.complaint()[0] == '\0');
    return 0;
}
