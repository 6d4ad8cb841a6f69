"""The explorer: a page in which one moves in a latent space, and a single file of it that a lecturer can upload.

terrain    what a run affords: directions, samples, images, races of starts, passages, reconstructions; plain values, no web
jobs       long work: a bounded queue, progress, cancelling, a limit on time
safety     what strangers may send: hosts, tokens, origins, body and image limits, the content security policy
app        routes, from all of these
export     one HTML file with the decoder's weights, which decodes in the browser
page/      the page itself: HTML, CSS and JavaScript as they are, without a build step
command    `periplus explore`

The page knows two backends with the same functions, the server and a decoder in JavaScript (`page/network.js`); the exported file is the same page
with the second one. Nothing here computes anything of its own about inversion or paths: that is `periplus.inversion` and `periplus.paths`.
"""
