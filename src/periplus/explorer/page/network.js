"use strict";var Periplus = window.Periplus || {}; window.Periplus = Periplus;
