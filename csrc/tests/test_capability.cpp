#include <string>

#include "check.h"

int main() {
    check::begin();
    const auto available = mooring::available_capabilities();
    CHECK(!available.empty() && available.front() == mooring::Capability::scalar);
    CHECK(std::string(mooring::name_of(mooring::active_capability())) == std::getenv("MOORING_CPU"));
    for (mooring::Capability capability : available) {
        mooring::set_capability(mooring::name_of(capability));
        CHECK(mooring::active_capability() == capability);
    }
    const mooring::Capability before = mooring::active_capability();
    for (const char* wrong : {"sse9", "", "AVX2"}) {
        bool refused = false;
        try {
            mooring::set_capability(wrong);
        } catch (const std::invalid_argument& error) {
            refused = std::string(error.what()).find("scalar") != std::string::npos;
        }
        CHECK(refused);
    }
    CHECK(mooring::active_capability() == before);
}
